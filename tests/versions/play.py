# SPDX-License-Identifier: Apache-2.0
"""Plays the engine to our connector, in an imitated vLLM: the version's own objects, its order of calls, a KV
cache in numpy arrays and a store in a directory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TOKENS, BLOCKS, HEADS, SIZE, LAYERS = 32, 40, 2, 32, 3  # tokens in an engine block, and so on
CHUNK = 128  # tokens in a block of the store


def make(cls: type, **known: Any) -> Any:
    """An object of a dataclass: what is known, where the version has it; nothing for the rest it asks for."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    needed = {n: None for n, f in fields.items()
              if f.default is f.default_factory is dataclasses.MISSING and n not in known}
    return cls(**needed, **{n: v for n, v in known.items() if n in fields})


class Tensor:
    """A numpy array with what is asked of a torch tensor."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, "float32"

    def stride(self, i: int | None = None) -> Any:
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        return strides if i is None else strides[i]

    def element_size(self) -> int:
        return self.array.itemsize

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def dim(self) -> int:
        return self.array.ndim


def pair() -> np.ndarray:
    """Keys and values apart, as up to 0.20."""
    return np.zeros((2, BLOCKS, HEADS, TOKENS, SIZE), np.float32)


def packed() -> np.ndarray:
    """Keys and values together, as from 0.23 on."""
    return np.zeros((BLOCKS, HEADS, TOKENS, 2 * SIZE), np.float32)


class Request:
    def __init__(self, name: str, tokens: int):
        self.request_id = name
        self.num_tokens = self.num_prompt_tokens = tokens
        self.num_output_tokens = 0
        self.all_token_ids, self.lora_request = list(range(tokens)), None
        self.block_hashes = [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(tokens // TOKENS)]


OURS = "ucm.integration.vllm.ucm_connector"


class Engine:
    """One life: a scheduler and one worker.  caches: layer -> tensors, one or several.  connector: a class
    around ours."""

    def __init__(self, directory: Path, caches: dict[str, list[np.ndarray]], connector: type | None = None,
                 device_type: str = "cpu"):
        from ucm.integration.vllm.ucm_connector import UCMConnector
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

        self.caches = caches
        self._has = set(dir(KVConnectorBase_V1))
        config, kv = self._config(directory, device_type), self._kv_config()
        make_one = connector or UCMConnector
        self.worker = make_one(config, KVConnectorRole.WORKER, kv)
        self.scheduler = make_one(config, KVConnectorRole.SCHEDULER, kv_cache_config=kv)
        tensors = {n: tuple(map(Tensor, c)) for n, c in caches.items()}
        self.worker.register_kv_caches({n: t if len(t) > 1 else t[0] for n, t in tensors.items()})

    @staticmethod
    def _config(directory: Path, device_type: str) -> Any:
        model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"layers": LAYERS}), dtype="float32",
                                quantization=None, model="none", revision=None)
        extra = {"storage_backends": str(directory), "store_pipeline": "Posix", "posix_segment_mb": 1,
                 "chunk_tokens": CHUNK, "model_id": str(directory), "use_layerwise": True}
        return SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_role="kv_both", kv_connector_extra_config=extra,
                                               kv_connector_module_path=None if device_type == "npu" else OURS),
            model_config=model,
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, world_size=1, rank=0),
            cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
            device_config=SimpleNamespace(device_type=device_type), speculative_config=None,
            kv_events_config=SimpleNamespace(enable_kv_cache_events=True))

    def _kv_config(self) -> Any:
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = make(FullAttentionSpec, block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype="float32")
        group = make(KVCacheGroupSpec, layer_names=list(self.caches), kv_cache_spec=spec)
        return make(KVCacheConfig, num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group],
                    kv_cache_layout="LBHNC")

    def ask(self, request: Request, blocks: list[int]) -> tuple[int, Any]:
        """A prompt in one step, in these blocks of the cache: how many tokens were loaded, and what the
        worker said.  What is not loaded is computed: every block gets numbers that follow from its hash."""
        told = self.scheduler.get_num_new_matched_tokens(request, 0)
        external, asynchronous = told
        self.scheduler.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (blocks,)), external)
        if not asynchronous:
            return external, self.step(request, blocks, external)
        output = self._receive(request, blocks)
        lost = [blocks.index(b) * TOKENS for b in output.invalid_block_ids]
        self.step(request, blocks, min(lost, default=external))
        return external, output

    def _receive(self, request: Request, blocks: list[int]) -> Any:
        """Steps in which nothing is computed, until a load aside has ended."""
        while True:
            output = self.step(request, blocks, request.num_tokens)
            if request.request_id in (output.finished_recving or ()):
                return output

    def step(self, request: Request, blocks: list[int], computed: int, new: bool = True) -> Any:
        """From there to the end of the prompt."""
        from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

        tokens = request.num_tokens - computed
        first = make(NewRequestData, req_id=request.request_id, block_ids=(blocks,), num_computed_tokens=computed)
        cached = make(CachedRequestData, req_ids=[] if new else [request.request_id], resumed_req_ids=set(),
                      new_block_ids=[] if new else [None], num_computed_tokens=[] if new else [computed])
        scheduled = make(SchedulerOutput, scheduled_new_reqs=[first] if new and tokens else [],
                         scheduled_cached_reqs=cached, total_num_scheduled_tokens=tokens,
                         num_scheduled_tokens={request.request_id: tokens} if tokens else {},
                         finished_req_ids=set(), preempted_req_ids=set(), has_sync_kv_loads=computed > 0)
        metadata = self.scheduler.build_connector_meta(scheduled)
        output = self._work(metadata, scheduled, request, blocks, computed)
        self.scheduler.update_connector_output(output)
        return output

    def _work(self, metadata: Any, scheduled: Any, request: Request, blocks: list[int], computed: int) -> Any:
        """The worker's half, in the order of vLLM's model runner."""
        from vllm.v1.outputs import KVConnectorOutput

        worker = self.worker
        if "build_connector_worker_meta" in self._has:
            worker.handle_preemptions(metadata)
        elif scheduled.preempted_req_ids:
            worker.handle_preemptions(scheduled.preempted_req_ids)
        worker.bind_connector_metadata(metadata)
        worker.start_load_kv(SimpleNamespace(attn_metadata={}))
        for layer, arrays in self.caches.items():
            worker.wait_for_layer_load(layer)
            for i in range(computed // TOKENS, request.num_tokens // TOKENS):
                for a in arrays:
                    block_of(a, blocks[i])[:] = content(request, i)
            worker.save_kv_layer(layer, None, None)
        worker.wait_for_save()
        known = {}
        if "get_transfer_results" in self._has:
            results = worker.get_transfer_results(scheduled.finished_req_ids)
            known = {"finished_sending": results.finished_sending, "finished_recving": results.finished_recving}
        else:
            known["finished_sending"], known["finished_recving"] = worker.get_finished(scheduled.finished_req_ids)
        known["invalid_block_ids"] = worker.get_block_ids_with_load_errors()
        known["kv_connector_stats"] = worker.get_kv_connector_stats()
        known["kv_cache_events"] = worker.get_kv_connector_kv_cache_events()
        if "build_connector_worker_meta" in self._has:
            known["kv_connector_worker_meta"] = worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        return make(KVConnectorOutput, **known)

    def finish(self, request: Request, blocks: list[int]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

        if isinstance(self.scheduler, SupportsHMA):
            delay, parameters = self.scheduler.request_finished_all_groups(request, (blocks,))
        else:
            delay, parameters = self.scheduler.request_finished(request, blocks)
        assert parameters is None

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()


def content(request: Request, i: int) -> float:
    return int.from_bytes(request.block_hashes[i][:2], "little") + 1


def block_of(array: np.ndarray, block: int) -> np.ndarray:
    at = next(d for d, n in enumerate(array.shape) if n == BLOCKS)
    return np.moveaxis(array, at, 0)[block]


def right(engine: Engine, request: Request, blocks: list[int], tokens: int) -> bool:
    """Whether these tokens of the prompt lie in the cache."""
    return all((block_of(a, blocks[i]) == content(request, i)).all()
               for arrays in engine.caches.values() for a in arrays for i in range(tokens // TOKENS))
