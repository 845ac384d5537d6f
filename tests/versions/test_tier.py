# SPDX-License-Identifier: Apache-2.0
"""UcmTier against the interface of secondary tiers, in the versions that find one by its module."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calls import TIER, find, signatures
from play import make
from source import VERSIONS, Source

ROWS, SIZE = 8, 8192
KEYS = [hashlib.sha256(bytes([i])).digest() + bytes(4) for i in range(ROWS)]
versions = pytest.mark.parametrize("version", [v for v in VERSIONS if v >= "0.30"])


def interface() -> dict[str, Any]:
    from ucm.integration.vllm.tier import UcmTier
    from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

    return {"missing": sorted(UcmTier.__abstractmethods__), "base": signatures(SecondaryTierManager),
            "ours": signatures(UcmTier), "abstract": set(SecondaryTierManager.__abstractmethods__)}


@versions
def test_the_interface(imitated, archive, version):
    told = imitated(version, interface)
    calls = find(Source(archive(version)), set(told["base"]), TIER)
    assert told["missing"] == [] and told["abstract"] <= {c.hook for c in calls}
    assert [c for c in calls if told["ours"][c.hook] and not c.fits(*told["ours"][c.hook])] == []


class Tier:
    """One life of the tier below a table of rows."""

    def __init__(self, directory: Path):
        from ucm.integration.vllm.tier import UcmTier

        parallel = SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True)
        config = SimpleNamespace(
            groups=(SimpleNamespace(tokens_per_block=128, layer_names=("0",)),), parallel=parallel,
            model=SimpleNamespace(name="none", dtype="float32"), cache=SimpleNamespace(tokens_per_hash=128),
            replicated_layout=False, canonical_layout=False, kv_cache_layout="LBHNC")
        spec = SimpleNamespace(config=config, blocks_per_chunk=1, extra_config={}, kv_events_config=None)
        self.rows = np.zeros((ROWS, SIZE), np.int8)
        self.tier = UcmTier(offloading_spec=spec, primary_kv_view=memoryview(self.rows), tier_type="UcmTier",
                            storage_backends=str(directory), posix_segment_mb=1, timeout_ms=20000)
        self.jobs = 0

    def move(self, promotion: bool, keys: list, rows: list[int]) -> Any:
        """One job, until its end."""
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.tiering.base import TransferJob

        self.jobs += 1
        self.request = make(ReqContext, req_id="a")
        self.tier.on_new_request(self.request)
        job = make(TransferJob, job_id=self.jobs, keys=tuple(keys), chunk_ids=np.array(rows, np.int32),
                   is_promotion=promotion, req_context=self.request)
        if promotion:
            assert all(self.hits(keys))  # vLLM loads what it has looked up
            self.tier.submit_load(job)
        else:
            self.tier.submit_store(job)
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self.jobs and list(self.tier.get_finished_jobs()) == []
        return result

    def hits(self, keys: list = KEYS) -> list[bool]:
        from vllm.v1.kv_offload.base import LookupResult

        return [self.tier.lookup(k, self.request) is LookupResult.HIT for k in keys]


def lives(directory: Path) -> None:
    """Stored, found by the next life, loaded into other rows; a damaged one is a miss and stays one."""
    content = np.random.default_rng(1).integers(-128, 128, (ROWS, SIZE), np.int8)
    first = Tier(directory)
    first.rows[:] = content
    assert first.move(False, KEYS[:6], list(range(6))).success
    first.tier.shutdown()

    (segment,) = directory.rglob("seg-*")
    data = segment.read_bytes()
    at = data.index(content[2].tobytes())
    segment.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])

    second = Tier(directory)
    result = second.move(True, KEYS[:4], [7, 6, 5, 4])
    assert not result.success and set(result.successful_keys) == {KEYS[0], KEYS[1], KEYS[3]}
    assert all((second.rows[7 - i] == content[i]).all() for i in (0, 1, 3))
    assert second.hits() == [True, True, False, True, True, True, False, False]
    second.tier.on_request_finished(second.request)
    second.rows[0] = content[2]
    assert second.move(False, KEYS[2:3], [0]).success
    second.tier.shutdown()

    third = Tier(directory)
    assert third.move(True, KEYS[2:3], [1]).success and (third.rows[1] == content[2]).all()
    assert third.hits() == [True] * 6 + [False] * 2
    third.tier.shutdown()


@versions
def test_lives(imitated, version, tmp_path):
    imitated(version, lives, tmp_path)


def failures(directory: Path) -> None:
    """A load that failed is not tried again by its request, whatever the store says; a store that cannot be
    asked, or does not take the job, is a miss."""
    from vllm.v1.kv_offload.base import LookupResult

    tier = Tier(directory)
    real, tier.tier._store = tier.tier._store, SimpleNamespace(
        lookup=lambda keys: b"\1" * (len(keys) // 16), load=lambda *args: refuse(), dump=lambda *args: refuse())
    result = tier.move(True, KEYS[:2], [0, 1])
    assert not result.success and not result.successful_keys
    assert tier.hits(KEYS[:3]) == [False, False, True]
    assert not tier.move(False, KEYS[:2], [0, 1]).success
    tier.tier._store.lookup = lambda keys: refuse()
    assert tier.tier.lookup(KEYS[5], tier.request) is LookupResult.MISS
    tier.tier._store = real
    tier.tier.shutdown()


def refuse() -> None:
    raise BlockingIOError(11, "queue full")


@versions
def test_failures(imitated, version, tmp_path):
    imitated(version, failures, tmp_path)
