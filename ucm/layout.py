# SPDX-License-Identifier: Apache-2.0
"""Where an engine's KV tensors keep the bytes of a block, read off their shapes and strides.

A layer is one tensor or several (K and V apart), a block is one index of each tensor's block dimension, or
several when the attention kernel's blocks are smaller than the engine's.  Everything else follows from the
strides: the bytes of a block within a tensor are cut into the fewest runs that are contiguous, in the order
of memory, and each run is a segment.  Integers only: a tensor is anything with shape, stride(),
element_size(), data_ptr() and dtype.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product


class LayoutError(ValueError):
    """The tensors cannot be cut into blocks, or not without guessing."""


@dataclass(frozen=True)
class Layout:
    segments: tuple  # [nshards][nsegs] of (address, stride, length), as Store.map() takes them
    shard_size: int  # bytes
    nshards: int
    nsegs: int
    block_bytes: int  # of one engine block, all shards
    shard_of: dict  # layer name -> shard
    description: str  # what the bytes of a block mean; equal descriptions, equal meaning


@dataclass(frozen=True)
class _Dim:
    label: str
    size: int
    stride: int  # bytes


def from_kv_caches(kv_caches, num_blocks):
    """The Layout of what an engine registers: a dict of layer name -> tensor, or tuple of tensors, or a list.

    num_blocks is the engine's, KVCacheConfig.num_blocks.
    """
    if num_blocks < 1:
        raise LayoutError(f"num_blocks: {num_blocks}; the engine has no KV blocks")
    if not isinstance(kv_caches, Mapping):
        kv_caches = {f"layer {i}": tensor for i, tensor in enumerate(kv_caches)}
    shards, shard_of, seen = [], {}, {}
    for name in sorted(kv_caches, key=_layer_order):
        tensors = kv_caches[name]
        tensors = list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]
        where = tuple((t.data_ptr(), tuple(t.shape), tuple(t.stride())) for t in tensors)
        if where not in seen:  # layers may share a cache
            seen[where] = len(shards)
            shards.append(_shard(name, tensors, num_blocks))
        shard_of[name] = seen[where]
    if not shards:
        raise LayoutError("kv_caches: there are no tensors")
    return _assemble(shards, shard_of)


def _layer_order(name):
    """Layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _assemble(shards, shard_of):
    sizes = [sum(length for _, _, length in segments) for segments, _ in shards]
    words = [text for _, text in shards]
    if len(set(sizes)) > 1:
        # Shards of a block have one size; layers that differ are stored as one shard together.
        shards = [([segment for segments, _ in shards for segment in segments], None)]
        shard_of = dict.fromkeys(shard_of, 0)
    nsegs = max(len(segments) for segments, _ in shards)
    padded = tuple(tuple(segments) + ((0, 0, 0),) * (nsegs - len(segments)) for segments, _ in shards)
    return Layout(
        segments=padded,
        shard_size=sum(sizes) // len(shards),
        nshards=len(shards),
        nsegs=nsegs,
        block_bytes=sum(sizes),
        shard_of=shard_of,
        description=_runs(words),
    )


def _runs(words):
    """["a", "a", "b"] as "2 x a, b"."""
    counted = []
    for word in words:
        if counted and counted[-1][1] == word:
            counted[-1][0] += 1
        else:
            counted.append([1, word])
    return ", ".join(word if n == 1 else f"{n} x {word}" for n, word in counted)


def _shard(name, tensors, num_blocks):
    segments, words = [], []
    for i, tensor in enumerate(tensors):
        what = name if len(tensors) == 1 else f"{name}[{i}]"
        cut, word = _cut(what, tensor, num_blocks)
        segments += cut
        words.append(word)
    return segments, " + ".join(words)


def _cut(what, tensor, num_blocks):
    """The segments of one tensor, and what its bytes mean."""
    item = tensor.element_size()
    shape = tuple(int(n) for n in tensor.shape)
    strides = tuple(int(n) * item for n in tensor.stride())
    if any(n < 1 for n in shape):
        raise LayoutError(f"{what}: shape {shape} is empty")
    _refuse_overlap(what, shape, strides, item)
    at = _block_dimension(what, shape, strides, num_blocks)
    ratio = shape[at] // num_blocks
    # Labels count the dimensions that are left, so that equal bytes have equal names in every layout.
    inner = [(n, s) for i, (n, s) in enumerate(zip(shape, strides)) if i != at and n > 1]
    dims = [_Dim(f"d{i}", n, s) for i, (n, s) in enumerate(inner)]
    if ratio > 1:
        dims.append(_Dim("kernel block", ratio, strides[at]))
    dims.sort(key=lambda dim: -dim.stride)
    dtype = str(tensor.dtype).removeprefix("torch.")
    word = f"{dtype}[{', '.join(f'{dim.label}={dim.size}' for dim in dims)}]"
    length = item
    while dims and dims[-1].stride == length:
        length *= dims.pop().size
    base = tensor.data_ptr()
    offsets = [sum(o) for o in product(*([dim.stride * i for i in range(dim.size)] for dim in dims))]
    return [(base + offset, strides[at] * ratio, length) for offset in offsets], word


def _block_dimension(what, shape, strides, num_blocks):
    """The one dimension that counts blocks: num_blocks long, or a multiple of it when the kernel's blocks
    are smaller.  No engine puts it innermost."""
    innermost = min((i for i, n in enumerate(shape) if n > 1), key=lambda i: strides[i], default=None)
    found = [i for i, n in enumerate(shape) if i != innermost and n % num_blocks == 0]
    if len(found) == 1:
        return found[0]
    if not found:
        raise LayoutError(
            f"{what}: no dimension of shape {shape} is num_blocks = {num_blocks} or a multiple of it; this is "
            "not a KV cache tensor of this engine, or a layout ucm does not know"
        )
    raise LayoutError(
        f"{what}: which dimension of shape {shape} counts the blocks is not clear, {len(found)} of them are "
        f"multiples of num_blocks = {num_blocks}; give the engine another number of blocks "
        "(vLLM: --num-gpu-blocks-override)"
    )


def _refuse_overlap(what, shape, strides, item):
    end = item  # of the bytes that the dimensions so far reach
    for stride, n in sorted((stride, n) for stride, n in zip(strides, shape) if n > 1):
        if stride < end:
            raise LayoutError(
                f"{what}: with strides of {strides} bytes the elements of shape {shape} share bytes; this is a "
                "view, not a cache"
            )
        end += stride * (n - 1)
