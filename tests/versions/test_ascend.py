# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own wrapper around UCMConnector, from its wheel: what it imports, how it makes one, what it
passes on, and KV caches as Ascend has them: keys and values in tensors apart, tokens before heads, each tensor
with strides of its own.  (The memory is the host's: there is no NPU here.)"""

from __future__ import annotations

import json
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
    from ucm.integration.vllm import device
    from vllm_ascend.distributed.kv_transfer.kv_pool.ucm_connector import UCMConnectorV1

    device.settle = lambda conf, device_type, moves: conf.set("device", "host")
    marks = device.Marks
    device.Marks = lambda device_type, *how: marks("cpu", *how)
    return UCMConnectorV1


def lives(directory: Path) -> list[int]:
    request, hits = play.Request("a", 4 * CHUNK + 40), []
    for blocks in (list(range(3, 21)), list(range(20, 2, -1))):
        engine = play.Engine(directory, caches(), wrapper(), device_type="npu")
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


def namespaces(directory: Path) -> list[dict]:
    """Of an NPU and of a GPU."""
    import vllm.v1.attention.backends.utils as utils
    from ucm.integration.vllm.geometry import derive

    utils.get_kv_cache_layout = lambda: "NHD"
    engine = play.Engine.__new__(play.Engine)
    engine.caches = caches()
    return [json.loads(derive(engine._config(directory, device_type), engine._kv_config(), CHUNK, "model").namespace)
            for device_type in ("npu", "cuda")]


@pytest.mark.parametrize("version, differ", [("0.23.0", set()), ("0.27.1", {"layout"})])
def test_a_gpu_loads_what_an_npu_stores_if_it_keeps_k_and_v_apart_too(imitated, tmp_path, version, differ):
    npu, gpu = imitated(version, namespaces, tmp_path)
    assert npu["layout"] == "NHC, K and V apart, unpacked"
    assert {key for key in npu if npu[key] != gpu[key]} == differ


def two_arguments(directory: Path) -> str:
    from ucm.integration.vllm.geometry import Unsupported
    from ucm.integration.vllm.ucm_connector import UCMConnector

    with pytest.raises(Unsupported) as e:
        play.Engine(directory, caches(), lambda config, role, kv_cache_config: UCMConnector(config, role))
    return str(e.value)


def test_the_wrapper_of_before_is_refused(imitated, tmp_path):
    """It makes one without the KV cache's configuration, and does not pass on get_finished."""
    assert "vllm-ascend 0.23" in imitated(VERSION, two_arguments, tmp_path)
