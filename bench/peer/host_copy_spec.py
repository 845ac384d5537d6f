# SPDX-License-Identifier: Apache-2.0
"""vLLM's own offloading tiers for an engine on the CPU, so that they can be measured beside ucm.

Their worker moves blocks with CUDA streams and refuses other platforms.  HostWorker moves the same blocks
with memmove; everything else (lookups, tiers, files, threads) is vLLM's.  To use it:
"spec_name": "HostTieringSpec", "spec_module_path": "host_copy_spec".
"""

from __future__ import annotations

import ctypes
import time

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies at once, in the caller's thread: a transfer has ended when submit returns."""

    def __init__(self, kv_caches, blocks_per_chunk: int, region: SharedOffloadRegion):
        self._engine = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._host = [region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk)
                      for t in kv_caches.tensors]
        self._refs, self._per_chunk, self._region = kv_caches.group_data_refs, blocks_per_chunk, region
        self._finished: list[TransferResult] = []

    def _copy(self, job_id: int, engine, host, store: bool) -> bool:
        begin, moved, at_block, at_chunk = time.perf_counter(), 0, 0, 0
        for refs, count, first in zip(self._refs, engine.group_sizes, engine.block_indices):
            if not count:
                continue
            skip = first % self._per_chunk  # the first chunk may begin in its middle
            for k in range(count):
                block = int(engine.block_ids[at_block + k])
                chunk = int(host.block_ids[at_chunk + (skip + k) // self._per_chunk])
                for ref in refs:
                    gpu, cpu = self._engine[ref.tensor_idx], self._host[ref.tensor_idx]
                    page = gpu.shape[1]
                    there = gpu.data_ptr() + block * gpu.stride(0)
                    here = cpu.data_ptr() + chunk * cpu.stride(0) + (skip + k) % self._per_chunk * page
                    ctypes.memmove(*((here, there) if store else (there, here)), ref.page_size_bytes)
                    moved += ref.page_size_bytes
            at_block += count
            at_chunk += -(-(skip + count) // self._per_chunk)
        self._finished.append(TransferResult(job_id, True, moved, time.perf_counter() - begin))
        return True

    def submit_store(self, job_id, src_spec, dst_spec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id, src_spec, dst_spec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._engine.clear()
        self._host.clear()
        self._region.cleanup()


class HostTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches):
        if not self._worker:
            region = SharedOffloadRegion(engine_id=self.config.engine_id, num_chunks=self.num_chunks,
                                         rank=self.config.parallel.rank,
                                         kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                                         cpu_page_size=self.cpu_page_size_per_worker)
            self._worker = HostWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
