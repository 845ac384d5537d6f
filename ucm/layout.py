# SPDX-License-Identifier: Apache-2.0
"""Where an engine's KV tensors keep the bytes of a block, read off their shapes and strides.

A layer is one tensor or several (K and V apart), a block is one index of each tensor's block dimension, or
several when the attention kernel's blocks are smaller than the engine's.  Everything else follows from the
strides: the bytes of a block are cut into the fewest runs that are contiguous, and each run is a segment.

The segments come in one order whatever the memory's: K before V, then tokens and heads, of which the memory says
which goes first, then content.  So engines that keep K and V in two tensors, in one as [2, blocks, ...] or in
one as [blocks, 2, ...] have the same bytes, and so have those with kernel blocks of any size.  What another
order would cut into pieces of a few bytes is another form (`Layout.forms`): heads before tokens, and K and V of a
token side by side.  Integers only: a tensor is anything with shape, stride(), element_size(), data_ptr() and dtype.
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
    forms: frozenset  # of Form, those of all layers


@dataclass(frozen=True)
class Form:
    """What engines must agree on, beyond sizes, for the bytes of a block to mean the same."""

    order: str | None  # of heads, tokens and content: "HNC", "NHC"; None: there is but one of heads, or of tokens
    apart: bool  # K and V are, all tokens of the one before the other's; else each token's content is both

    def __str__(self):
        return f"{self.order or 'NC'}{', K and V apart' if self.apart else ''}"


@dataclass(frozen=True)
class _Dim:
    label: str
    size: int
    stride: int  # bytes


def from_kv_caches(kv_caches, num_blocks, tokens):
    """The Layout of what an engine registers: a dict of layer name -> tensor, or tuple of tensors, or a list.

    num_blocks is the engine's, KVCacheConfig.num_blocks, each of so many tokens.
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
            shards.append(_shard(name, tensors, num_blocks, tokens))
        shard_of[name] = seen[where]
    if not shards:
        raise LayoutError("kv_caches: there are no tensors")
    return _assemble(shards, shard_of)


def _layer_order(name):
    """Layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _assemble(shards, shard_of):
    sizes = [sum(length for _, _, length in segments) for segments, _, _ in shards]
    words = [text for _, text, _ in shards]
    forms = frozenset(form for _, _, form in shards)
    if len(set(sizes)) > 1:
        # Shards of a block have one size; layers that differ are stored as one shard together.
        shards = [([segment for segments, *_ in shards for segment in segments],)]
        shard_of = dict.fromkeys(shard_of, 0)
    nsegs = max(len(segments) for segments, *_ in shards)
    padded = tuple(tuple(segments) + ((0, 0, 0),) * (nsegs - len(segments)) for segments, *_ in shards)
    return Layout(
        segments=padded,
        shard_size=sum(sizes) // len(shards),
        nshards=len(shards),
        nsegs=nsegs,
        block_bytes=sum(sizes),
        shard_of=shard_of,
        description=_runs(words),
        forms=forms,
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


def _shard(name, tensors, num_blocks, tokens):
    segments, words, orders = [], [], []
    for i, tensor in enumerate(tensors):
        what = name if len(tensors) == 1 else f"{name}[{i}]"
        cut, dtype, dims, order = _cut(what, tensor, num_blocks, tokens, len(tensors) > 1)
        segments += cut
        words.append((dtype, *(f"{dim.label}={dim.size}" for dim in dims)))
        orders.append(order)
    if len(set(orders)) > 1:
        raise LayoutError(f"{name}: its tensors are in different order, {' and '.join(map(str, orders))}")
    if len(words) == 2 and words[0] == words[1]:  # K and V in two tensors are one in two halves
        words = [(words[0][0], "kv=2", *words[0][1:])]
    text = " + ".join(f"{dtype}[{', '.join(dims)}]" for dtype, *dims in words)
    return segments, text, Form(orders[0], len(tensors) > 1 or "kv=2" in words[0])


def _cut(what, tensor, num_blocks, tokens, apart):
    """The segments of one tensor, its dtype, its dimensions in the order of its bytes, and the order's name."""
    item = tensor.element_size()
    shape = tuple(int(n) for n in tensor.shape)
    strides = tuple(int(n) * item for n in tensor.stride())
    if any(n < 1 for n in shape):
        raise LayoutError(f"{what}: shape {shape} is empty")
    _refuse_overlap(what, shape, strides, item)
    at = _block_dimension(what, shape, strides, num_blocks)
    ratio = shape[at] // num_blocks
    inner = [(n, s) for i, (n, s) in enumerate(zip(shape, strides)) if i != at]
    labels = _labels(what, [n for n, _ in inner], tokens // ratio, apart)
    known = {label: _Dim(label, n, s) for label, (n, s) in zip(labels, inner) if n > 1}
    dims = sorted(known.values(), key=lambda dim: (dim.label != "kv", -dim.stride))
    both = [dim.label for dim in dims if dim.label in ("tokens", "heads")]
    order = {"heads": "HNC", "tokens": "NHC"}[both[0]] if len(both) == 2 else None
    if ratio > 1:  # of one head, all tokens
        first = next((i for i, dim in enumerate(dims) if dim.label == "tokens"), len(dims))
        dims.insert(first, _Dim("kernel blocks", ratio, strides[at]))
    runs, length = list(dims), item
    while runs and runs[-1].stride == length:
        length *= runs.pop().size
    base = tensor.data_ptr()
    offsets = [sum(o) for o in product(*([dim.stride * i for i in range(dim.size)] for dim in runs))]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [(base + offset, strides[at] * ratio, length) for offset in offsets], dtype, dims, order


def _labels(what, sizes, tokens, apart):
    """Of the dimensions of a block.  Engines differ in whether tokens or heads come first; where there are as many
    of the one as of the other: in tensors of K and V, heads do where these are one's content."""
    if len(sizes) <= 2:
        return ("tokens", "content")[-len(sizes):]
    if len(sizes) == 4 and sizes[0] == 2:
        return "kv", *_labels(what, sizes[1:], tokens, True)
    if len(sizes) != 3 or tokens not in sizes[:2]:
        raise LayoutError(f"{what}: which dimensions of a block, {tuple(sizes)}, count its {tokens} tokens is not clear; "
                          "this is not a layout that ucm knows")
    heads_first = sizes[0] != tokens or (sizes[0] == sizes[1] and not apart)
    return ("heads", "tokens", "content") if heads_first else ("tokens", "heads", "content")


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
