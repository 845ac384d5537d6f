# SPDX-License-Identifier: Apache-2.0
"""vLLM's tiering where there is no GPU: everything is vLLM's own but the copies between the engine and the CPU
tier, for which it wants a GPU's streams.  Loaded by the engine: spec_module_path."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies at once, in the calling thread.  One KV cache group, one engine block in a chunk."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion):
        (self._layers,) = kv_caches.group_data_refs
        self._region = region
        self._engine = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._tier = [region.create_next_worker_view(t.page_size_bytes) for t in kv_caches.tensors]
        self._done: list[int] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._engine, src_spec, self._tier, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._tier, src_spec, self._engine, dst_spec)

    def _copy(self, job_id: int, sources: list, src_spec: Any, targets: list, dst_spec: Any) -> bool:
        for tensor in {layer.tensor_idx for layer in self._layers}:
            targets[tensor][dst_spec.block_ids] = sources[tensor][src_spec.block_ids]
        self._done.append(job_id)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return [TransferResult(job_id=job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._engine.clear()
        self._tier.clear()
        self._region.cleanup()


class HostTiering(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id, num_chunks=self.num_chunks, rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker)
            self._worker = HostWorker(kv_caches, region)
        return self._worker
