# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of vLLM, 0.17 to 0.32, found by looking for it and not by number.

The rest of this package is written for the newest version.  What an older one has not, or has otherwise, is
asked for here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Set
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from ucm.layout import Form

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # before 0.32
    CacheHitSource = None

if TYPE_CHECKING:
    from vllm.config import CacheConfig, KVTransferConfig, ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput

RANDOM_SEED = "random"  # of block hashes: they differ from process to process

# What a worker's answer to the scheduler inherits from; before 0.20 it cannot answer.
KVConnectorWorkerMetadata = getattr(base, "KVConnectorWorkerMetadata", object)
# What a worker sends the scheduler when the engine starts.
KVConnectorHandshakeMetadata = getattr(base, "KVConnectorHandshakeMetadata", object)
WORKERS_ANSWER = KVConnectorWorkerMetadata is not object
# Before 0.23 a connector cannot take blocks out of the engine's own prefix cache.
CAN_EVICT = hasattr(base.KVConnectorBase_V1, "bind_gpu_block_pool")
# Before 0.30 a failed load can be reported by engine blocks only.  With several groups, or a window, these do not
# say what is to be computed again: without this class vLLM makes one group of all layers, if it can.
FAILS_BY_REQUEST = hasattr(base, "KVConnectorTransferResults")
SupportsHMA = base.SupportsHMA if FAILS_BY_REQUEST else object


def runs_ahead(vllm_config: VllmConfig) -> bool:
    """Whether steps are computed on counts that the scheduler may have lowered since, because a synchronous load has
    failed (vllm-project/vllm#49250; the model runner V2 keeps counts of its own).  True of 0.32 and all before."""
    scheduling = getattr(vllm_config, "scheduler_config", None)
    return bool(getattr(scheduling, "async_scheduling", False) or getattr(vllm_config, "use_v2_model_runner", False))


def worker_answer(output: KVConnectorOutput) -> Any:
    return getattr(output, "kv_connector_worker_meta", None)


def transfer_results(sent: Set[str] | None, received: Set[str] | None, failed: set[str]) -> Any:
    """Asked for from 0.30 on."""
    return base.KVConnectorTransferResults(set(sent or ()), set(received or ()), failed)


def hash_tokens(cache: CacheConfig, engine_tokens: int) -> int:
    """In one of vLLM's block hashes: an engine block's, unless an option says otherwise (since 0.27)."""
    return getattr(cache, "prefix_match_unit", None) or engine_tokens


def preempted(argument: Any) -> Set[str]:
    """What handle_preemptions is given: our metadata, every step; before 0.20 the requests, if any."""
    return argument if isinstance(argument, set) else argument.preempted


def cache_hit_sources(fast: int, slow: int) -> dict[Any, int]:
    """Tokens from DRAM and from slower tiers, as vLLM counts them.  Asked for from 0.32 on."""
    counts = {CacheHitSource.HOST: fast, CacheHitSource.DISK: slow}
    return {source: tokens for source, tokens in counts.items() if tokens}


def event_hash(block_hash: Any) -> Any:
    """A block's hash as vLLM's own events give it."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    return maybe_convert_block_hash(block_hash)


def _event(kind: type, fields: dict[str, Any]) -> Any:
    """Without the fields that this version's event does not have."""
    return kind(**{field: value for field, value in fields.items() if field in kind.__struct_fields__})


def block_stored(**fields: Any) -> Any:
    from vllm.distributed.kv_events import BlockStored

    return _event(BlockStored, fields)


def block_removed(**fields: Any) -> Any:
    from vllm.distributed.kv_events import BlockRemoved

    return _event(BlockRemoved, fields)


def form(device_type: str, kv_cache_config: KVCacheConfig, spec: AttentionSpec) -> Form:
    """Of a layer's block."""
    if device_type == "npu":  # vllm-ascend's tensors do not follow vLLM's layout
        order, apart = "NHC", True
    elif (layout := getattr(kv_cache_config, "kv_cache_layout", None)) is not None:
        order, apart = "".join(c for c in layout if c in "HNC"), False
    else:  # before 0.30
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        order = {"HND": "HNC", "NHD": "NHC"}[get_kv_cache_layout()]
        apart = type(spec).__name__ != "MLAAttentionSpec" and _apart(device_type)
    return Form(order if spec.num_kv_heads > 1 else None, apart)


def _apart(device_type: str) -> bool:
    """Whether this version's attention keeps K and V apart: [2, blocks, ...] or [blocks, 2, ...].  All backends of a
    platform agree, and those that do not are refused when their tensors are seen."""
    name, backend = {"cpu": ("cpu_attn", "CPU")}.get(device_type, ("triton_attn", "Triton"))
    module = import_module(f"vllm.v1.attention.backends.{name}")
    return len(getattr(module, f"{backend}AttentionBackend").get_kv_cache_shape(1, 32, 2, 32)) == 5


def hash_seed(algorithm: str) -> str:
    """What the first hash of every chain is made from, as in vLLM's own resolve_none_hash_seed."""
    given = os.environ.get("PYTHONHASHSEED")
    if given is not None:
        return given
    if not algorithm.startswith("sha256"):
        return RANDOM_SEED
    try:
        from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED
    except ImportError:  # before 0.30
        return RANDOM_SEED
    return DEFAULT_NONE_HASH_SEED


def parallel_size(parallel: ParallelConfig, name: str) -> int:
    return getattr(parallel, name, 1)


def copies(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """How many consecutive ranks hold the same: all of them of a latent.  (Those that share a head of few do
    too, but from the outside that cannot be told for sure: each stores its own.)"""
    said = getattr(kv_cache_config, "kv_tp_replicas", None)  # since 0.32
    if said is not None:
        return said
    parallel = vllm_config.parallel_config
    width = parallel.tensor_parallel_size
    if width == 1 or parallel_size(parallel, "decode_context_parallel_size") > 1:
        return 1
    return width if vllm_config.model_config.use_mla else 1


def failure_policy(transfer: KVTransferConfig) -> str:
    return getattr(transfer, "kv_load_failure_policy", "recompute")
