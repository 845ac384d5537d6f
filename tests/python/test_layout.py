# SPDX-License-Identifier: Apache-2.0
"""Each layout vLLM has used, against the bytes that indexing the tensor itself gives; and engines that differ in it,
through one store."""

import ctypes

import numpy as np
import pytest

import ucm
from ucm.layout import Form, LayoutError, from_kv_caches

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
    "Ascend, K or V": ((B, N, H, C), (0, 1, 2, 3), 0, (0, 1, 2), 1),
    "FlashAttention": ((2, B, N, H, C), (0, 1, 2, 3, 4), 1, (0, 1, 2, 3), 2),
    "FlashAttention HND": ((2, B, N, H, C), (0, 1, 3, 2, 4), 1, (0, 2, 1, 3), 2),
    "CPU before 0.23": ((2, B, H, N, C), (0, 1, 2, 3, 4), 1, (0, 1, 2, 3), 2),
    "FlashInfer": ((B, 2, N, H, C), (0, 1, 2, 3, 4), 0, (0, 1, 2, 3), 1),
    "FlashInfer HND": ((B, 2, N, H, C), (0, 1, 3, 2, 4), 0, (0, 2, 1, 3), 1),
    "MLA": ((B, N, C), (0, 1, 2), 0, (0, 1), 1),
    "MLA 0.30": ((B, 1, N, C), (0, 1, 2, 3), 0, (0, 1, 2), 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_hold_the_bytes_of_each_block(name):
    shape, physical, at, order, nsegs = LAYOUTS[name]
    arrays = [view(shape, physical) for _ in range(3)]
    layout = from_kv_caches({f"layers.{i}": Tensor(a) for i, a in enumerate(arrays)}, B, N)
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
    layout = from_kv_caches([Tensor(layer) for layer in whole], B, N)
    assert (layout.nshards, layout.nsegs) == (5, H if physical == "BHLNC" else 1)
    order = (1, 0, 2) if physical == "BLNHC" else (0, 1, 2)
    for shard in range(5):
        for block in range(B):
            assert gather(layout, shard, block) == whole[shard, block].transpose(order).tobytes()


@pytest.mark.parametrize("shape, physical, order, nsegs", [
    ((2 * B, H, N, C), (0, 1, 2, 3), (1, 0, 2, 3), 2 * H),  # a head's tokens are in two places
    ((2 * B, H, N, C), (1, 0, 2, 3), (1, 0, 2, 3), H),
    ((2 * B, H, N, C), (0, 2, 1, 3), (0, 2, 1, 3), 1),
    ((2 * B, 2, N, H, C), (0, 1, 2, 3, 4), (1, 0, 2, 3, 4), 4),
    ((2 * B, N, C), (0, 1, 2), (0, 1, 2), 1),
])  # fmt: skip
def test_kernel_blocks_smaller_than_the_engines(shape, physical, order, nsegs):
    array = view(shape, physical)
    layout = from_kv_caches([Tensor(array)], B, 2 * N)
    assert layout.nsegs == nsegs and layout.block_bytes * B == array.nbytes
    for block in range(B):
        assert gather(layout, 0, block) == array[2 * block : 2 * block + 2].transpose(order).tobytes()


def test_scattered_kernel_blocks_are_cut_apart():
    padded = filled(2 * B, H * N * C + 6)
    array = padded[:, : H * N * C].reshape(2 * B, H, N, C).transpose(0, 2, 1, 3)
    layout = from_kv_caches([Tensor(array)], B, 2 * H)
    assert layout.nsegs == 2
    for block in range(B):
        assert gather(layout, 0, block) == array[2 * block : 2 * block + 2].transpose(0, 2, 1, 3).tobytes()


def test_padded_pages():
    array = filled(B, 1000)[:, : N * C].reshape(B, N, C)
    layout = from_kv_caches([Tensor(array)], B, N)
    assert layout.segments == (((array.ctypes.data, 2000, N * C * 2),),)


def test_the_innermost_dimension_never_counts_blocks():
    array = filled(B, N, 2 * B)
    assert gather(from_kv_caches([Tensor(array)], B, N), 0, 9) == array[9].tobytes()


def test_k_and_v_apart_and_layers_in_their_order():
    caches = {f"model.layers.{i}.attn": (Tensor(filled(B, N, H, C)), Tensor(filled(B, N, H, C))) for i in (10, 9, 2)}
    layout = from_kv_caches(caches, B, N)
    assert layout.shard_of == {"model.layers.2.attn": 0, "model.layers.9.attn": 1, "model.layers.10.attn": 2}
    k, v = caches["model.layers.9.attn"]
    assert gather(layout, 1, 5) == k.array[5].tobytes() + v.array[5].tobytes()


def test_layers_that_share_a_cache_are_stored_once():
    one, two = Tensor(filled(B, N, C)), Tensor(filled(B, N, C))
    layout = from_kv_caches({"l.0": one, "l.1": two, "l.2": Tensor(one.array)}, B, N)
    assert layout.nshards == 2 and layout.shard_of == {"l.0": 0, "l.1": 1, "l.2": 0}


def test_layers_of_different_size_become_one_shard():
    a, b = filled(B, N, C), filled(B, N, 2 * C)
    layout = from_kv_caches([Tensor(a), Tensor(b)], B, N)
    assert (layout.nshards, layout.nsegs, layout.shard_size) == (1, 2, layout.block_bytes)
    assert set(layout.shard_of.values()) == {0}
    assert gather(layout, 0, 3) == a[3].tobytes() + b[3].tobytes()


def test_fewer_segments_are_filled_up_with_empty_ones():
    whole, apart = Tensor(filled(B, 2, N, H, C)), Tensor(filled(2, B, N, H, C))
    layout = from_kv_caches([whole, apart], B, N)
    assert [len(shard) for shard in layout.segments] == [2, 2] and layout.segments[0][1] == (0, 0, 0)
    assert gather(layout, 1, 7) == apart.array[:, 7].tobytes()


def test_equal_bytes_have_equal_descriptions():
    def words(name):
        shape, physical, *_ = LAYOUTS[name]
        return from_kv_caches([Tensor(view(shape, physical))], B, N).description

    assert words("FlashAttention") == words("FlashInfer") == "uint16[kv=2, tokens=8, heads=3, content=10]"
    assert words("LBHNC") == words("LHBNC") != words("LBNHC")
    assert words("MLA") == words("MLA 0.30")
    pair = tuple(Tensor(view(*LAYOUTS["Ascend, K or V"][:2])) for _ in range(2))
    assert from_kv_caches([pair], B, N).description == words("FlashAttention")
    layers = [Tensor(filled(B, N, C)) for _ in range(4)]
    assert from_kv_caches(layers, B, N).description == "4 x uint16[tokens=8, content=10]"
    halves = from_kv_caches([Tensor(filled(2 * B, N, C))], B, 2 * N).description
    assert halves == "uint16[kernel blocks=2, tokens=8, content=10]"


@pytest.mark.parametrize("array, num_blocks, why", [
    (filled(B, N, C), B + 1, "no dimension"),
    (filled(2, 2, N, C), 2, "not clear"),
    (filled(16, 3, 16, C), 16, "not clear, 2 of them"),
    (filled(32, 3, 16, C), 16, "not clear, 2 of them"),
    (filled(B, N, 0), B, "is empty"),
    (filled(B, H, C, N), B, r"dimensions of a block, \(3, 10, 8\), count its 8 tokens is not clear"),
    (filled(B, N, C), 0, "num_blocks: 0"),
    (np.broadcast_to(filled(1, N, C), (B, N, C)), B, "share bytes"),
    (np.lib.stride_tricks.as_strided(filled(B, N, C), (B, N, C), (N * C, C * 2, 2)), B, "share bytes"),
])  # fmt: skip
def test_refused(array, num_blocks, why):
    with pytest.raises(LayoutError, match=why):
        from_kv_caches({"l": Tensor(array)}, num_blocks, N)


def test_nothing_to_lay_out():
    with pytest.raises(LayoutError, match="no tensors"):
        from_kv_caches({}, B, N)


def test_real_tensors():
    torch = pytest.importorskip("torch", reason="torch comes with an engine")
    backing = torch.arange(B * 4 * H * N * C * 2, dtype=torch.int16)
    whole = backing[: B * 4 * H * N * C].view(torch.bfloat16).reshape(B, 4, H, N, C)
    layout = from_kv_caches({f"l.{i}": whole[:, i] for i in range(4)}, B, N)
    assert layout.description == "4 x bfloat16[heads=3, tokens=8, content=10]" and layout.nsegs == 1
    for shard in range(4):
        want = whole[11, shard].contiguous().view(torch.int16).numpy().tobytes()
        assert gather(layout, shard, 11) == want


# ---- engines of different layouts, one store ----

# How memory is ordered: Layers, Planes (K, V), Blocks, Kernel blocks in one, tokens (N), Heads, Content; the tensor of a
# layer as the engine registers it, planes in tensors of their own or not.
ENGINES = {
    "NHC, K and V apart": [("LPBNHC", "BNHC"), ("LPBNHC", "PBNHC"), ("LBPNHC", "BPNHC"), ("BLPNHC", "BPNHC"),
                           ("LBKPNHC", "BPNHC"), ("LPBKNHC", "PBNHC")],
    "HNC, K and V apart": [("LPBHNC", "PBHNC"), ("LPBHNC", "PBNHC"), ("LBPHNC", "BPNHC"), ("LBKPHNC", "BPNHC")],
    "NHC": [("LBNHC", "BHNC"), ("BLNHC", "BHNC"), ("LBKNHC", "BHNC")],
    "HNC": [("LBHNC", "BHNC"), ("LHBNC", "BHNC"), ("BLHNC", "BHNC"), ("BHLNC", "BHNC"), ("LBKHNC", "BHNC")],
}
LAYERS, BLOCKS, TOKENS, RATIO = 3, 11, 8, 2


class Memory:
    def __init__(self, memory, tensor):
        kernel = 2 if "K" in memory else 1
        sizes = {"L": LAYERS, "P": 2, "B": BLOCKS, "K": kernel, "N": TOKENS // kernel, "H": 3, "C": 10}
        self.array = np.zeros([sizes[d] for d in memory], np.uint16)
        strides = dict(zip(memory, self.array.strides))
        strides["B"] = strides.get("K", strides["B"])
        apart = "P" in memory and "P" not in tensor
        start = [{d: i for d, i in (("L", layer), ("P", plane))} for layer in range(LAYERS) for plane in range(1 + apart)]
        views = [Tensor(np.lib.stride_tricks.as_strided(
            self.array[tuple(at.get(d, slice(None)) if d in "L" + "P" * apart else slice(None) for d in memory)],
            [sizes[d] * (kernel if d == "B" else 1) for d in tensor], [strides[d] for d in tensor])) for at in start]
        self.layout = from_kv_caches([tuple(views[i : i + 2]) if apart else views[i]
                                      for i in range(0, len(views), 1 + apart)], BLOCKS, TOKENS)
        self.blocks = self.array.transpose([memory.index(d) for d in "BLPKNHC" if d in memory])
        self.shape = [LAYERS, 2 if "P" in memory else 1, TOKENS, 3, 10]

    def tokens(self, blocks):
        """[block, layer, K or V, token, head, content]"""
        return [self.blocks[b].reshape(self.shape) for b in blocks]

    def map(self, store):
        return store.map(self.layout.segments, RATIO, BLOCKS)


@pytest.mark.parametrize("device", ["host", "sim"])
@pytest.mark.parametrize("form", ENGINES)
def test_engines_of_one_form_share_their_blocks(open_store, form, device):
    """Each dumps, each loads what each has dumped, into other places; byte for byte."""
    engines = [Memory(*how) for how in ENGINES[form]]
    assert {str(f) for e in engines for f in e.layout.forms} == {form}
    shard = engines[0].layout.shard_size * RATIO
    store = open_store(store_pipeline="Cache|Posix", cache_buffer_capacity_gb=0.01, device=device,
                       shard_size=shard, block_size=shard * LAYERS)
    rng = np.random.default_rng(len(form))
    for i, writer in enumerate(engines):
        writer.array[:] = rng.integers(1, 1 << 16, writer.array.shape)
        store.dump(writer.map(store), bytes([i]) * 16, np.array([7, 2], np.uint32)).wait("stored")
    wanted = [np.array(writer.tokens([7, 2])) for writer in engines]
    for reader in engines:
        for i, want in enumerate(wanted):
            store.load(reader.map(store), bytes([i]) * 16, np.array([4, 5], np.uint32)).wait()
            assert (np.array(reader.tokens([4, 5])) == want).all()


def test_what_the_map_cannot_express_has_another_name():
    """Its pieces would be a head's content of one token."""
    forms = [{str(f) for how in engines for f in Memory(*how).layout.forms} for engines in ENGINES.values()]
    assert forms == [{name} for name in ENGINES]
    assert all(Memory(*how).layout.nsegs <= 2 * 2 * 3 for engines in ENGINES.values() for how in engines)


@pytest.mark.parametrize("tensors, form", [
    (((B, 1, N, C),), Form(None, False)), (((B, N, C),), Form(None, False)),  # a latent, with its rope
    (((B, N, 1, C), (B, N, 1, 2)), Form(None, True)),  # and apart, as Ascend has them
    (((B, N, N, C),), Form("HNC", False)), (((B, N, N, C),) * 2, Form("NHC", True)), (((B, 2, N, N, C),), Form("NHC", True)),
])
def test_forms(tensors, form):
    given = tuple(Tensor(filled(*shape)) for shape in tensors)
    assert from_kv_caches([given if len(given) > 1 else given[0]], B, N).forms == {form}


def test_k_and_v_in_different_order_are_refused():
    with pytest.raises(LayoutError, match="different order, NHC and HNC"):
        from_kv_caches([(Tensor(filled(B, N, H, C)), Tensor(filled(B, H, N, C)))], B, N)
