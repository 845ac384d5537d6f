# SPDX-License-Identifier: Apache-2.0
"""What the scheduler and its workers must agree on, computed by both from vLLM's own configuration.

The scheduler has no tensors, so sizes come from the KV cache specs; a worker checks them against its
tensors.  The namespace text names everything but the key that changes a block's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from ucm.integration.vllm import compat, device
from ucm.layout import Form, Layout

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec


SERVED = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec")
# Speculative decoding: by a model whose layers have KV caches beside the first one's; by none.
DRAFTS, GUESSES = ("draft_model", "eagle", "eagle3", "mtp"), ("ngram", "suffix")


class Unsupported(ValueError):
    """This engine configuration cannot be served; the text says what and what to do."""


@dataclass(frozen=True)
class Geometry:
    """Layers with block tables of their own are a group, and each group has blocks of its own in the store: all of
    one size, for vLLM lays the groups over the same memory, the first layers of all groups in one place, then
    the second ones.  The last group may have fewer; what is in the rest of its blocks means nothing."""

    engine_tokens: int  # in an engine block
    ratio: int  # engine blocks in a block of the store
    layers: tuple[str, ...]  # of all groups; a shard is one of each
    form: Form  # of what an engine block holds
    shard_size: int
    block_size: int
    namespace: str
    hash_seed: str
    rank: int = 0  # whose part of each block this is
    ranks: int = 1  # how many parts a block has
    saves: bool = True  # of ranks that hold the same part, the first saves it
    stage: int = 0  # of a pipeline: each has a namespace of its own, for it has layers of its own
    stages: int = 1
    windows: tuple[int, ...] = (0,)  # of each group: how many tokens a token sees, itself too; 0: all before it
    hash_tokens: int = 0  # in one of vLLM's block hashes; 0: as in an engine block
    page_tokens: int = 0  # of an engine block, in this rank's tensors; 0: all

    @property
    def block_tokens(self) -> int:
        return self.engine_tokens * self.ratio

    @property
    def hashes(self) -> int:
        """In a block of the store."""
        return self.block_tokens // (self.hash_tokens or self.engine_tokens)

    @property
    def plain(self) -> bool:
        """One group that keeps all of a prompt: of a load that fails, what came before its first bad block counts."""
        return self.windows == (0,)

    def first_needed(self, group: int, tokens: int) -> int:
        """The first position that a request which goes on after so many tokens needs."""
        return self._left(group, tokens) // self.block_tokens

    def first_whole(self, group: int, tokens: int) -> int:
        """The first of whose engine blocks such a request has given none back."""
        return -(-(self._left(group, tokens) // self.engine_tokens) // self.ratio)

    def _left(self, group: int, tokens: int) -> int:
        """Tokens that have left the window."""
        return max(0, tokens + 1 - self.windows[group]) if self.windows[group] else 0


def derive(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, chunk_tokens: int,
           model_id: str) -> Geometry:
    _check_supported(vllm_config, kv_cache_config)
    groups = kv_cache_config.kv_cache_groups
    spec = _uniform_spec(groups)
    place = _Place(vllm_config.parallel_config)
    engine_tokens = spec.block_size * place.token_shards
    ratio = _ratio(engine_tokens, chunk_tokens)
    windows = tuple(_window(group.kv_cache_spec) for group in groups)
    layers = [group.layer_names for group in groups]
    shard_size = spec.real_page_size_bytes * ratio
    device_type = vllm_config.device_config.device_type
    form = compat.form(device_type, kv_cache_config, spec)
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    seed = compat.hash_seed(algorithm)
    model = vllm_config.model_config
    copies = compat.copies(vllm_config, kv_cache_config)
    identity = {
        "engine": "vllm",
        "model": model_id or _model_identity(model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_dtype": f"{vllm_config.cache_config.cache_dtype} {spec.dtype}",
        "block_tokens": engine_tokens * ratio,
        "engine_block_tokens": engine_tokens,
        "layers": [len(names) for names in layers],
        "layer_names": _digest(layers),
        "windows": windows,
        "draft": _draft_identity(vllm_config.speculative_config),
        "kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "layer_bytes": spec.real_page_size_bytes,
        "layout": f"{form}, {packing(device_type)}",
        "ranks": place.width // copies,
        "tokens_over": place.tokens_over,
        "stage": f"{place.stage} of {place.stages}",
        "hash": f"{algorithm} {seed}",
    }
    return Geometry(
        engine_tokens=engine_tokens,
        ratio=ratio,
        layers=tuple(name for names in layers for name in names),
        form=form,
        shard_size=shard_size,
        block_size=shard_size * max(map(len, layers)),
        namespace=json.dumps(identity, sort_keys=True, separators=(",", ":")),
        hash_seed=seed,
        rank=place.position // copies,
        ranks=place.width // copies,
        saves=place.position % copies == 0,
        stage=place.stage,
        stages=place.stages,
        windows=windows,
        hash_tokens=compat.hash_tokens(vllm_config.cache_config, engine_tokens),
        page_tokens=spec.block_size,
    )


class _Place:
    """Where a process stands in its engine.  Ranks go through the tensor parallel ones first, then those of
    prefill context parallelism, then the stages of the pipeline."""

    def __init__(self, parallel: ParallelConfig):
        self.width = parallel.tensor_parallel_size * compat.parallel_size(parallel, "prefill_context_parallel_size")
        self.position = parallel.rank % self.width
        self.stages = parallel.pipeline_parallel_size
        self.stage = parallel.rank // self.width % self.stages
        # Decode context parallelism deals the tokens of a block out to ranks, so many at a time.
        self.token_shards = compat.parallel_size(parallel, "decode_context_parallel_size")
        interleave = compat.parallel_size(parallel, "cp_kv_cache_interleave_size")
        self.tokens_over = f"{self.token_shards} by {interleave}" if self.token_shards > 1 else "1"


def check_tensors(geometry: Geometry, layout: Layout) -> None:
    """The worker's tensors are what the specs promised, or the engine must not start: blocks would be
    stored under the name of another layout."""
    promised = geometry.block_size // geometry.shard_size
    if layout.nshards != promised or layout.shard_size * geometry.ratio != geometry.shard_size:
        raise Unsupported(
            f"the KV cache tensors hold {layout.nshards} layers of {layout.shard_size} bytes for "
            f"{geometry.engine_tokens} tokens, vLLM's KV cache specs say {promised} of "
            f"{geometry.shard_size // geometry.ratio}: this attention backend is not supported yet")
    for form in layout.forms:
        if form.apart != geometry.form.apart or form.order not in (None, geometry.form.order):
            raise Unsupported(f"the KV cache tensors are {form}, vLLM's configuration says {geometry.form}: "
                              "this attention backend is not supported yet")


def _check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    if device.named(vllm_config.device_config.device_type) is None:
        raise Unsupported(f"ucm knows no device '{vllm_config.device_config.device_type}'; `ucm doctor devices` "
                          f"lists those it knows")
    if kv_cache_config is None:
        raise Unsupported("whoever made this connector did not give it the KV cache's configuration; "
                          "of vllm-ascend, take vllm-ascend 0.23 or later")
    groups = kv_cache_config.kv_cache_groups
    for layer in (layer for group in groups for layer in _layer_specs(group.kv_cache_spec)):
        # By name: what is derived from these keeps other things, or drops some of it while a request runs.
        if type(layer).__name__ not in SERVED or getattr(layer, "tokens_per_state", 1) != 1:
            raise Unsupported(f"ucm serves full and sliding-window attention (MHA, GQA, MLA) only, so far; this "
                              f"model's KV cache is {type(layer).__name__}")
    if not compat.FAILS_BY_REQUEST and (len(groups) != 1 or _window(groups[0].kv_cache_spec)):
        raise Unsupported("ucm serves sliding windows and several KV cache groups from vLLM 0.30 on: take that, or "
                          "start with --disable-hybrid-kv-cache-manager")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in DRAFTS + GUESSES:
        raise Unsupported(f"ucm serves speculative decoding by {', '.join(DRAFTS + GUESSES)} only, so far; this "
                          f"engine's is {speculative.method}")
    if speculative is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise Unsupported("ucm does not serve speculative decoding in a pipeline of several stages: vLLM does not tell "
                          "the connector of any but the last when a step ends")
    if drafts(speculative) and not compat.FAILS_BY_REQUEST:
        raise Unsupported(f"ucm serves speculative decoding by {speculative.method} from vLLM 0.30 on; with this one "
                          f"{' and '.join(GUESSES)} work")


def drafts(speculative: SpeculativeConfig | None) -> bool:
    """Whether a block holds layers of a draft model too.  What is in them cannot make an answer wrong, for the model
    checks every guess."""
    return speculative is not None and speculative.method in DRAFTS


def _layer_specs(spec: Any) -> list[Any]:
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def _window(spec: Any) -> int:
    """Full attention may have a window too: vLLM keeps everything then."""
    kind = _layer_specs(spec)[0]
    if type(kind).__name__ != "SlidingWindowSpec":
        return 0
    return kind.sliding_window + getattr(kind, "extra_retained_tokens", 0)  # vLLM holds so many more for MTP


def _uniform_spec(groups: list[KVCacheGroupSpec]) -> AttentionSpec:
    """What all layers have in common."""
    specs = [spec for group in groups for spec in _layer_specs(group.kv_cache_spec)]
    shapes = {(s.block_size, getattr(s, "dcp_sharded", True), s.num_kv_heads, s.head_size, s.real_page_size_bytes,
               str(s.dtype)) for s in specs}
    if len(shapes) > 1:
        raise Unsupported("ucm serves models whose layers all have the same KV cache shape only, so far")
    return specs[0]


def _ratio(engine_tokens: int, chunk_tokens: int) -> int:
    if chunk_tokens == 0:
        return max(1, -(-128 // engine_tokens))
    if chunk_tokens % engine_tokens:
        raise Unsupported(f"chunk_tokens is {chunk_tokens}, must be a multiple of the engine's block size, "
                          f"{engine_tokens}")
    return chunk_tokens // engine_tokens


def packing(device_type: str) -> str:
    """vLLM's CPU attention packs keys and values to suit the processor; elsewhere they lie as their shape says,
    so that devices of different vendors can share."""
    if device_type != "cpu":
        return "unpacked"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {capability}{' AMX' if amx else ''}"


def _model_identity(model: ModelConfig) -> dict[str, str]:
    """Two models that differ in their weights alone must not share: a configuration does not tell them
    apart, so the name, the revision and, for a directory, samples of the weights are part of it."""
    config = model.hf_config.to_dict()
    commit = config.pop("_commit_hash", None) or getattr(model.hf_config, "_commit_hash", None)
    config = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    identity = {"config": _digest(config), "revision": str(commit or model.revision)}
    if os.path.isdir(model.model):
        identity["weights"] = sample_weights(Path(model.model))
    else:
        identity["name"] = str(model.model)
    return identity


def _draft_identity(speculative: SpeculativeConfig | None) -> str:
    """Not part of model_id: it names the model that answers."""
    if not drafts(speculative):
        return "none"
    return f"{speculative.method} {_digest(_model_identity(speculative.draft_model_config))}"


SAMPLES, SAMPLE = 16, 4096  # of a file of weights, and bytes in each
SMALL_TENSORS, SMALL = 64, 64 << 10  # and of its small tensors, which samples of the file hardly meet


def sample_weights(directory: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(f for f in directory.iterdir()
                   if f.suffix in (".safetensors", ".bin", ".pt", ".gguf") and f.is_file())
    for f in files:
        size = f.stat().st_size
        digest.update(f"{f.name} {size}\n".encode())
        with open(f, "rb") as stream:
            places = [(size * i // SAMPLES, SAMPLE) for i in range(SAMPLES)]
            if f.suffix == ".safetensors":
                places += _small_tensors(stream)
            for at, length in places:
                stream.seek(at)
                digest.update(stream.read(length))
    return digest.hexdigest()[:32]


def _small_tensors(stream: BinaryIO) -> list[tuple[int, int]]:
    """Where norms and biases lie, evenly chosen: fine-tunes may differ in nothing else."""
    length = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(length))
    except ValueError:
        return []  # whoever loads the model will say so
    places = sorted((8 + length + begin, end - begin) for name, tensor in header.items() if name != "__metadata__"
                    for begin, end in [tensor["data_offsets"]] if end - begin <= SMALL)
    return places[::max(1, len(places) // SMALL_TENSORS)]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
