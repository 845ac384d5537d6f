# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own wrapper around UCMConnector, from its wheel: what it imports, how it makes one, what it
passes on, and KV caches as Ascend has them: keys and values in tensors apart, tokens before heads, each tensor
with strides of its own.  (The memory is the host's: an NPU's is refused so far.)"""

from __future__ import annotations

from pathlib import Path

import imitation
import numpy as np
import play
import pytest
from play import BLOCKS, CHUNK, HEADS, LAYERS, SIZE, TOKENS

VERSION = "0.23.0"


def tensor(padding: int) -> np.ndarray:
    """One index a block; what lies between two blocks is not the cache's."""
    block = TOKENS * HEADS * SIZE
    whole = np.full((BLOCKS, block + padding), np.nan, np.float32)
    return np.lib.stride_tricks.as_strided(whole, (BLOCKS, TOKENS, HEADS, SIZE),
                                           (whole.strides[0], HEADS * SIZE * 4, SIZE * 4, 4))


def caches() -> dict[str, list[np.ndarray]]:
    return {f"model.layers.{i}.self_attn.attn": [tensor(64 * i), tensor(64 * i + 32)] for i in range(LAYERS)}


def wrapper() -> type:
    import vllm.v1.attention.backends.utils as utils
    from vllm_ascend.distributed.kv_transfer.kv_pool.ucm_connector import UCMConnectorV1

    utils.get_kv_cache_layout = lambda: "NHD"
    return UCMConnectorV1


def lives(directory: Path) -> list[int]:
    request, hits = play.Request("a", 4 * CHUNK + 40), []
    for blocks in (list(range(3, 21)), list(range(20, 2, -1))):
        engine = play.Engine(directory, caches(), wrapper())
        hit, output = engine.ask(request, blocks)
        assert play.right(engine, request, blocks, hit) and not output.invalid_block_ids
        assert engine.scheduler.get_kv_connector_stats() is None
        hits.append(hit)
        engine.finish(request, blocks)
        engine.close()
    return hits


@pytest.fixture
def ascend(archive):
    return lambda work, *args: imitation.run([archive(VERSION), archive(VERSION, "vllm-ascend")], work, *args)


def test_a_life_and_a_restart(ascend, tmp_path):
    assert ascend(lives, tmp_path) == [0, 4 * CHUNK]


def two_arguments(directory: Path) -> str:
    from ucm.integration.vllm.geometry import Unsupported
    from ucm.integration.vllm.ucm_connector import UCMConnector

    with pytest.raises(Unsupported) as e:
        play.Engine(directory, caches(), lambda config, role, kv_cache_config: UCMConnector(config, role))
    return str(e.value)


def test_the_wrapper_of_before_is_refused(imitated, tmp_path):
    """It makes one without the KV cache's configuration, and does not pass on get_finished."""
    assert "vllm-ascend 0.23" in imitated(VERSION, two_arguments, tmp_path)
