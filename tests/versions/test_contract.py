# SPDX-License-Identifier: Apache-2.0
"""UCMConnector is what each version of vLLM takes for a connector, and works with what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import play
import pytest
from calls import find, signatures
from source import VERSIONS, Source

every_version = pytest.mark.parametrize("version", VERSIONS)
NEWEST = VERSIONS[-1]


def interface() -> dict[str, Any]:
    """Of this vLLM's base class and of ours: hook -> (signature, whether it takes self), or None."""
    from ucm.integration.vllm.ucm_connector import UCMConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    base = {**signatures(SupportsHMA), **signatures(KVConnectorBase_V1)}
    return {"missing": sorted(UCMConnector.__abstractmethods__), "base": base, "ours": signatures(UCMConnector),
            "overridden": {n for n in vars(UCMConnector) if not n.startswith("_")},
            "abstract": set(KVConnectorBase_V1.__abstractmethods__)}


@every_version
def test_every_abstract_method_is_there(imitated, version):
    assert imitated(version, interface)["missing"] == []


@every_version
def test_every_call_that_the_engine_makes_fits(imitated, archive, version):
    told = imitated(version, interface)
    calls = find(Source(archive(version)), set(told["base"]))
    assert told["abstract"] <= {c.hook for c in calls}, "the scan has missed calls"
    wrong = [c for c in calls if told["ours"][c.hook] and not c.fits(*told["ours"][c.hook])]
    assert wrong == []


@every_version
def test_a_hook_that_is_not_known_is_one_of_a_newer_version(imitated, version):
    """It is never called then; a name of no version would be a slip of the pen."""
    strangers = imitated(version, interface)["overridden"] - set(imitated(version, interface)["base"])
    assert strangers <= set(imitated(NEWEST, interface)["base"])


def forms() -> list[str]:
    """Of a block, on a CPU, a GPU and an NPU; and of a latent."""
    from ucm.integration.vllm import compat
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

    kv = play.make(KVCacheConfig, kv_cache_layout="LBHNC")
    many = play.make(FullAttentionSpec, block_size=32, num_kv_heads=2, head_size=32, dtype="float32")
    latent = play.make(MLAAttentionSpec, block_size=32, num_kv_heads=1, head_size=32, dtype="float32")
    return [str(compat.form(device, kv, spec)) for device, spec in (("cpu", many), ("cuda", many), ("npu", many),
                                                                     ("cuda", latent), ("npu", latent))]


@every_version
def test_engines_that_keep_blocks_in_another_form_say_so(imitated, version):
    """Else one would load what the other has stored, under the same name."""
    side, apart = "HNC", "HNC, K and V apart"
    assert imitated(version, forms) == [apart if version < "0.23" else side, apart if version < "0.27" else side,
                                        "NHC, K and V apart", "NC", "NC, K and V apart"]


# ---- a whole life ----

def caches(version: str) -> dict[str, list]:
    new = play.pair if version < "0.23" else play.packed
    return {f"model.layers.{i}.self_attn.attn": [new()] for i in range(play.LAYERS)}


def lives(directory: Path, version: str) -> list[int]:
    """Twice the same prompt, with a restart between."""
    request, blocks, hits = play.Request("a", 4 * play.CHUNK + 40), list(range(3, 21)), []
    for _ in range(2):
        engine = play.Engine(directory, caches(version))
        hit, output = engine.ask(request, blocks)
        assert play.right(engine, request, blocks, hit) and not output.invalid_block_ids
        hits.append(hit)
        engine.finish(request, blocks)
        engine.close()
    return hits


@every_version
def test_a_life_and_a_restart(imitated, version, tmp_path):
    assert imitated(version, lives, tmp_path, version) == [0, 4 * play.CHUNK]


def published(directory: Path, version: str) -> list[Any]:
    """What is announced of a prompt that was saved."""
    request, blocks, events = play.Request("a", 4 * play.CHUNK + 40), list(range(3, 21)), []
    engine = play.Engine(directory, caches(version))
    engine.ask(request, blocks)
    while len(events) < 4:
        engine.step(request, blocks, request.num_tokens)
        events += engine.scheduler.take_events()
    engine.close()
    return [(type(e).__name__, e.block_size, e.medium, e.token_ids) for e in events]


@every_version
def test_what_was_saved_is_announced(imitated, version, tmp_path):
    assert imitated(version, published, tmp_path, version) == [
        ("BlockStored", play.TOKENS, "STORAGE", list(range(i * play.CHUNK, (i + 1) * play.CHUNK))) for i in range(4)]


def damaged(directory: Path, version: str) -> None:
    request, blocks = play.Request("a", 4 * play.CHUNK + 40), list(range(3, 21))
    engine = play.Engine(directory, caches(version))
    engine.ask(request, blocks)
    engine.close()
    spoil(directory, 2)
    engine = play.Engine(directory, caches(version))
    hit, output = engine.ask(request, blocks)
    assert hit == 4 * play.CHUNK
    bad = min(blocks.index(b) for b in output.invalid_block_ids) * play.TOKENS
    # Up to there it was right; vLLM computes the rest again, and what was lost is saved again.
    assert bad < hit and play.right(engine, request, blocks, bad)
    engine.step(request, blocks, bad, new=False)
    assert play.right(engine, request, blocks, hit)
    engine.close()
    engine = play.Engine(directory, caches(version))
    hit, output = engine.ask(request, blocks)
    assert hit == 4 * play.CHUNK and not output.invalid_block_ids and play.right(engine, request, blocks, hit)
    engine.close()


def spoil(directory: Path, block: int) -> None:
    """One bit of the n-th block of the store."""
    (segment,) = directory.rglob("seg-*")
    data = bytearray(segment.read_bytes())
    size = play.LAYERS * 2 * play.CHUNK * play.HEADS * play.SIZE * 4
    at = block * size + size // 2
    data[at] ^= 1
    segment.write_bytes(data)


@every_version
def test_what_was_lost_is_computed_and_saved_again(imitated, version, tmp_path):
    imitated(version, damaged, tmp_path, version)
