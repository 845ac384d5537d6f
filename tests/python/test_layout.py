# SPDX-License-Identifier: Apache-2.0
"""Each layout vLLM has used, against the bytes that indexing the tensor itself gives."""

import ctypes

import numpy as np
import pytest

from ucm.layout import LayoutError, from_kv_caches

B, H, N, C = 24, 3, 8, 10  # blocks, heads, tokens, content


class Tensor:
    """What layout.py asks of a torch tensor, over a numpy array."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self):
        return self.array.itemsize

    def data_ptr(self):
        return self.array.ctypes.data


def filled(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 1 << 16, shape).astype(np.uint16)


def view(logical, physical):
    """A tensor of shape logical whose dimensions lie in memory in the order physical."""
    array = filled(*(logical[i] for i in physical)).transpose(np.argsort(physical))
    assert array.shape == tuple(logical)
    return array


def gather(layout, shard, block):
    return b"".join(
        ctypes.string_at(address + block * stride, length)
        for address, stride, length in layout.segments[shard]
    )


# name: (shape, order in memory, block dimension, order of a block's bytes, segments)
LAYOUTS = {
    "LBHNC": ((B, H, N, C), (0, 1, 2, 3), 0, (0, 1, 2), 1),
    "LBNHC": ((B, H, N, C), (0, 2, 1, 3), 0, (1, 0, 2), 1),
    "LHBNC": ((B, H, N, C), (1, 0, 2, 3), 0, (0, 1, 2), H),
    "FlashAttention": ((2, B, N, H, C), (0, 1, 2, 3, 4), 1, (0, 1, 2, 3), 2),
    "FlashAttention HND": ((2, B, N, H, C), (0, 1, 3, 2, 4), 1, (0, 2, 1, 3), 2),
    "CPU before 0.23": ((2, B, H, N, C), (0, 1, 2, 3, 4), 1, (0, 1, 2, 3), 2),
    "FlashInfer": ((B, 2, N, H, C), (0, 1, 2, 3, 4), 0, (0, 1, 2, 3), 1),
    "FlashInfer HND": ((B, 2, N, H, C), (0, 1, 3, 2, 4), 0, (0, 2, 1, 3), 1),
    "MLA": ((B, N, C), (0, 1, 2), 0, (0, 1), 1),
    "MLA 0.30": ((B, 1, N, C), (0, 1, 2, 3), 0, (0, 1, 2), 1),
    "packed V": ((B, H, C, N), (0, 1, 2, 3), 0, (0, 1, 2), 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_hold_the_bytes_of_each_block(name):
    shape, physical, at, order, nsegs = LAYOUTS[name]
    arrays = [view(shape, physical) for _ in range(3)]
    layout = from_kv_caches({f"layers.{i}": Tensor(a) for i, a in enumerate(arrays)}, B)
    assert (layout.nshards, layout.nsegs) == (3, nsegs)
    assert layout.block_bytes * B == sum(a.nbytes for a in arrays) == layout.shard_size * 3 * B
    for shard, array in enumerate(arrays):
        for block in range(B):
            want = array.take(block, axis=at).transpose(order).tobytes()
            assert gather(layout, shard, block) == want


@pytest.mark.parametrize("physical", ["BLHNC", "BLNHC", "BHLNC"])
def test_layers_that_share_one_allocation(physical):
    sizes = {"B": B, "L": 5, "H": H, "N": N, "C": C}
    whole = filled(*(sizes[d] for d in physical)).transpose([physical.index(d) for d in "LBHNC"])
    layout = from_kv_caches([Tensor(layer) for layer in whole], B)
    assert (layout.nshards, layout.nsegs) == (5, H if physical == "BHLNC" else 1)
    order = (1, 0, 2) if physical == "BLNHC" else (0, 1, 2)
    for shard in range(5):
        for block in range(B):
            assert gather(layout, shard, block) == whole[shard, block].transpose(order).tobytes()


@pytest.mark.parametrize("shape, physical, nsegs", [
    ((2 * B, H, N, C), (0, 1, 2, 3), 1),
    ((2 * B, H, N, C), (1, 0, 2, 3), H),
])  # fmt: skip
def test_kernel_blocks_smaller_than_the_engines(shape, physical, nsegs):
    array = view(shape, physical)
    layout = from_kv_caches([Tensor(array)], B)
    assert layout.nsegs == nsegs and layout.block_bytes * B == array.nbytes
    order = (0, 1, 2, 3) if physical[0] == 0 else (1, 0, 2, 3)
    for block in range(B):
        assert gather(layout, 0, block) == array[2 * block : 2 * block + 2].transpose(order).tobytes()


def test_scattered_kernel_blocks_are_cut_apart():
    padded = filled(2 * B, H * N * C + 6)
    array = padded[:, : H * N * C].reshape(2 * B, H, N, C)
    layout = from_kv_caches([Tensor(array)], B)
    assert layout.nsegs == 2
    for block in range(B):
        assert gather(layout, 0, block) == array[2 * block : 2 * block + 2].tobytes()


def test_padded_pages():
    array = filled(B, 1000)[:, : N * C].reshape(B, N, C)
    layout = from_kv_caches([Tensor(array)], B)
    assert layout.segments == (((array.ctypes.data, 2000, N * C * 2),),)


def test_the_innermost_dimension_never_counts_blocks():
    array = filled(B, N, 2 * B)
    assert gather(from_kv_caches([Tensor(array)], B), 0, 9) == array[9].tobytes()


def test_k_and_v_apart_and_layers_in_their_order():
    caches = {f"model.layers.{i}.attn": (Tensor(filled(B, N, H, C)), Tensor(filled(B, N, H, C))) for i in (10, 9, 2)}
    layout = from_kv_caches(caches, B)
    assert layout.shard_of == {"model.layers.2.attn": 0, "model.layers.9.attn": 1, "model.layers.10.attn": 2}
    k, v = caches["model.layers.9.attn"]
    assert gather(layout, 1, 5) == k.array[5].tobytes() + v.array[5].tobytes()


def test_layers_that_share_a_cache_are_stored_once():
    one, two = Tensor(filled(B, N, C)), Tensor(filled(B, N, C))
    layout = from_kv_caches({"l.0": one, "l.1": two, "l.2": Tensor(one.array)}, B)
    assert layout.nshards == 2 and layout.shard_of == {"l.0": 0, "l.1": 1, "l.2": 0}


def test_layers_of_different_size_become_one_shard():
    a, b = filled(B, N, C), filled(B, N, 2 * C)
    layout = from_kv_caches([Tensor(a), Tensor(b)], B)
    assert (layout.nshards, layout.nsegs, layout.shard_size) == (1, 2, layout.block_bytes)
    assert set(layout.shard_of.values()) == {0}
    assert gather(layout, 0, 3) == a[3].tobytes() + b[3].tobytes()


def test_fewer_segments_are_filled_up_with_empty_ones():
    whole, apart = Tensor(filled(B, 2, N, H, C)), Tensor(filled(2, B, N, H, C))
    layout = from_kv_caches([whole, apart], B)
    assert [len(shard) for shard in layout.segments] == [2, 2] and layout.segments[0][1] == (0, 0, 0)
    assert gather(layout, 1, 7) == apart.array[:, 7].tobytes()


def test_equal_bytes_have_equal_descriptions():
    def words(name):
        shape, physical, *_ = LAYOUTS[name]
        return from_kv_caches([Tensor(view(shape, physical))], B).description

    assert words("FlashAttention") == words("FlashInfer") == "uint16[d0=2, d1=8, d2=3, d3=10]"
    assert words("LBHNC") == words("LHBNC") != words("LBNHC")
    assert words("MLA") == words("MLA 0.30")
    layers = [Tensor(filled(B, N, C)) for _ in range(4)]
    assert from_kv_caches(layers, B).description == "4 x uint16[d0=8, d1=10]"
    halves = from_kv_caches([Tensor(filled(2 * B, N, C))], B).description
    assert halves == "uint16[kernel block=2, d0=8, d1=10]" != from_kv_caches([Tensor(filled(B, 2 * N, C))], B).description


@pytest.mark.parametrize("array, num_blocks, why", [
    (filled(B, N, C), B + 1, "no dimension"),
    (filled(2, 2, N, C), 2, "not clear"),
    (filled(16, 3, 16, C), 16, "not clear, 2 of them"),
    (filled(32, 3, 16, C), 16, "not clear, 2 of them"),
    (filled(B, N, 0), B, "is empty"),
    (filled(B, N, C), 0, "num_blocks: 0"),
    (np.broadcast_to(filled(1, N, C), (B, N, C)), B, "share bytes"),
    (np.lib.stride_tricks.as_strided(filled(B, N, C), (B, N, C), (N * C, C * 2, 2)), B, "share bytes"),
])  # fmt: skip
def test_refused(array, num_blocks, why):
    with pytest.raises(LayoutError, match=why):
        from_kv_caches({"l": Tensor(array)}, num_blocks)


def test_nothing_to_lay_out():
    with pytest.raises(LayoutError, match="no tensors"):
        from_kv_caches({}, B)


def test_real_tensors():
    torch = pytest.importorskip("torch", reason="torch comes with an engine")
    backing = torch.arange(B * 4 * H * N * C * 2, dtype=torch.int16)
    whole = backing[: B * 4 * H * N * C].view(torch.bfloat16).reshape(B, 4, H, N, C)
    layout = from_kv_caches({f"l.{i}": whole[:, i] for i in range(4)}, B)
    assert layout.description == "4 x bfloat16[d0=3, d1=8, d2=10]" and layout.nsegs == 1
    for shard in range(4):
        want = whole[11, shard].contiguous().view(torch.int16).numpy().tobytes()
        assert gather(layout, shard, 11) == want
