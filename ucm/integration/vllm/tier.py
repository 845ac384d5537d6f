# SPDX-License-Identifier: Apache-2.0
"""ucm below vLLM's own CPU tier: a secondary tier for OffloadingConnector with TieringOffloadingSpec (vLLM 0.30
and later), found by "module_path": "ucm.integration.vllm.tier", "type": "UcmTier".  Every other key of that
entry is an option of ucm.

vLLM moves chunks between its engine and the CPU tier, a table of rows; each row is one block of one shard to
the store.  All calls come from the scheduler, so nothing here waits for data.  A block that is absent, damaged
or late is a miss; what is being moved is pinned by vLLM until reported here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import Locality, LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

import ucm
from ucm import _log, config
from ucm.integration.vllm import geometry

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ReqContext

logger = logging.getLogger(f"vllm.{__name__}")

ABSENT = bytes(1)
GRACE_MS = 1000  # on top of the store's own deadline, which ends each slice


class UcmTier(SecondaryTierManager):
    medium = Medium.STORAGE

    def __init__(self, offloading_spec: OffloadingSpec, primary_kv_view: memoryview, tier_type: str,
                 backpressure_detector: Any = None, locality: str | None = None, **options: Any):
        extra = {} if backpressure_detector is None else {"backpressure_detector": backpressure_detector}
        super().__init__(offloading_spec, primary_kv_view, tier_type, **extra)  # not known to 0.30
        _log.share(logging.getLogger("vllm"))
        self.locality = None if locality is None else Locality(locality)
        rows, size = primary_kv_view.shape
        # DRAM is above already: what is not said otherwise is storage alone.
        conf = config.from_extra_config(options, {"store_pipeline": "Posix"})
        conf.set("namespace", _namespace(offloading_spec, size, conf.get("model_id")))
        conf.set("block_size", size)
        conf.set("shard_size", size)
        self._timeout_ms = int(conf.get("timeout_ms"))
        self._store = ucm.Store(conf)
        self._map: Any = self._store.map([[(np.asarray(primary_kv_view).ctypes.data, size, size)]], 1, rows)
        self._jobs: dict[int, tuple[TransferJob, Any]] = {}
        self._ended: list[JobResult] = []
        self._absent: dict[str, set[OffloadKey]] = {}  # by request: what it need not ask for again
        logger.info("ucm: %d chunks of %d bytes; %s", rows, size, conf.get("namespace"))

    # ---- requests ----

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        absent = self._absent.setdefault(req_context.req_id, set())
        if key not in absent:
            try:
                if self._store.lookup(_name(key)) != ABSENT:
                    return LookupResult.HIT
            except OSError as e:
                logger.debug("lookup failed, taken for a miss: %s", e)
            absent.add(key)
        return LookupResult.MISS

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._absent.pop(req_context.req_id, None)

    # ---- jobs ----

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._store.dump, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._store.load, job_metadata)

    def _submit(self, move: Any, job: TransferJob) -> None:
        rows = np.ascontiguousarray(job.chunk_ids, np.uint32)
        try:
            self._jobs[job.job_id] = job, move(self._map, b"".join(map(_name, job.keys)), rows, _depths(job))
        except OSError as e:
            logger.debug("job %d not begun: %s", job.job_id, e)
            self._end(job, range(len(rows)))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job, task in list(self._jobs.values()):
            if task.done("released"):
                del self._jobs[job.job_id]
                self._end(job, task.failed())
        ended, self._ended = self._ended, []
        return ended

    def _end(self, job: TransferJob, failed: Iterable[int]) -> None:
        keys, bad = list(job.keys), set(failed)
        good = [k for i, k in enumerate(keys) if i not in bad]
        if bad and job.is_promotion:
            logger.warning("request %s: %d of %d chunks could not be loaded and will be computed",
                           job.req_context.req_id, len(bad), len(keys))
            if (absent := self._absent.get(job.req_context.req_id)) is not None:
                absent.update(keys[i] for i in bad)
        self._ended.append(JobResult(job_id=job.job_id, success=not bad,
                                     successful_keys=tuple(good) if bad and good else None))

    def drain_jobs(self) -> None:
        """The store ends every slice by its own deadline; what is left then hangs, and the memory is its."""
        while not self._drained():
            pass

    def _drained(self) -> bool:
        """Waits for each job, for as long as the store takes to give one up."""
        for job, task in self._jobs.values():
            try:
                task.wait("released", self._timeout_ms + GRACE_MS)
            except OSError as e:
                logger.debug("job %d: %s", job.job_id, e)
        return all(task.done("released") for _, task in self._jobs.values())

    def shutdown(self) -> None:
        if not self._drained():  # told so, vLLM does not unmap the memory
            raise RuntimeError("ucm: storage hangs and still holds memory of the CPU tier")
        self._map = None
        self._store.close()


def _name(key: OffloadKey) -> bytes:
    """vLLM's key is a block hash and the number of its KV cache group."""
    return hashlib.blake2b(key, digest_size=ucm.KEY_SIZE).digest()


def _depths(job: TransferJob) -> array:
    """How far into its prompt each chunk ends, where vLLM says so."""
    position = getattr(job.req_context, "get_offload_key_position", lambda key: None)
    return array("I", [position(key) or i for i, key in enumerate(job.keys)])


def _namespace(spec: OffloadingSpec, size: int, model_id: str) -> str:
    """What vLLM's own file tier tells its directories apart by, and what that leaves out."""
    identity = FileMapper.from_offloading_spec("", spec, spec.blocks_per_chunk, parallel_agnostic=True).fields
    model = spec.config.model.name
    if model_id:
        identity["model_name"] = model_id
    elif os.path.isdir(model):
        identity["weights"] = geometry.sample_weights(Path(model))
    identity["bytes"] = size
    identity["layout"] = spec.config.kv_cache_layout
    if current_platform.is_cpu():
        identity["packing"] = geometry.packing("cpu")
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), default=str)
