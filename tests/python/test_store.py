# SPDX-License-Identifier: Apache-2.0
"""Stores, maps, buffers: what goes in comes out, and what is wrong is refused by name."""

import errno
import time
from array import array

import numpy as np
import pytest
from helpers import NBLOCKS, NSHARDS, SHARD, Engine, keys, numbers

import ucm


def test_round_trip(open_store, engine):
    store = open_store()
    engine.fill(1)
    want = engine.bytes.copy()
    map = engine.map(store)
    store.dump(map, keys("a", "b", "c"), numbers(3, 5, 7)).wait("stored")
    engine.bytes[:] = 0
    begin = time.monotonic()
    task = store.load(map, keys("a", "b", "c"), numbers(10, 11, 12))
    task.wait()
    assert (engine.bytes[:, 10:13] == want[:, [3, 5, 7]]).all()
    assert not engine.bytes[:, :10].any() and not engine.bytes[:, 13:].any()
    assert (len(task), task.failed(), task.status(2), task.done("stored")) == (3, [], 0, True)
    assert 0 < task.elapsed() <= task.elapsed("stored") <= time.monotonic() - begin


def test_lookups_are_exact(open_store, engine):
    """The first block's absence says nothing about the others."""
    store = open_store()
    store.dump(engine.map(store), keys("b", "d"), numbers(0, 1)).wait("stored")
    assert store.lookup(keys("a", "b", "c", "d")) == b"\0\1\0\1"
    assert store.lookup_prefix(keys("a", "b")) == 0
    assert store.lookup_prefix(keys("b", "d", "c")) == 2
    assert store.lookup(b"") == b"" and store.lookup_prefix(b"") == 0
    store.prefetch(keys("a", "b"))


def test_lookup_names_the_tier(open_store, engine):
    store = open_store(store_pipeline="Cache|Posix", cache_buffer_capacity_gb=0.01)
    store.dump(engine.map(store), keys("a"), numbers(0)).wait("stored")
    assert store.lookup(keys("a")) == b"\1"
    store.close()
    assert open_store(store_pipeline="Cache|Posix", cache_buffer_capacity_gb=0.01).lookup(keys("a")) == b"\2"


def test_blocks_outlive_the_store(open_store, engine):
    store = open_store()
    engine.fill(2)
    store.dump(engine.map(store), keys("a"), numbers(4)).wait("stored")
    store.close()
    store, other = open_store(), Engine()
    store.load(other.map(store), keys("a"), numbers(9)).wait()
    assert (other.bytes[:, 9] == engine.bytes[:, 4]).all()


def test_shards_and_groups(open_store, engine):
    store = open_store()
    engine.fill(3)
    map = engine.map(store)
    store.dump(map, keys("a", "b"), numbers(0, 1)).wait("stored")
    other = Engine()
    task = store.load(other.map(store), keys("a", "b"), numbers(0, 1), shard=1, nshards=3, group=1)
    for shard in (1, 2, 3):
        task.wait_shard(shard)
        assert (other.bytes[shard, :2] == engine.bytes[shard, :2]).all()
    assert not other.bytes[0].any()


def test_several_engine_blocks_a_key(open_store):
    store = open_store(block_size=NSHARDS * SHARD * 2, shard_size=SHARD * 2)
    engine, other = Engine().fill(4), Engine()
    store.dump(store.map(engine.segments, 2, NBLOCKS), keys("a"), numbers(3, 9)).wait("stored")
    store.load(store.map(other.segments, 2, NBLOCKS), keys("a"), numbers(1, 0)).wait()
    assert (other.bytes[:, [1, 0]] == engine.bytes[:, [3, 9]]).all()


def test_explicit_addresses(open_store, engine):
    store = open_store()
    engine.fill(5)
    base, whole = engine.bytes.ctypes.data, keys("a", "a", "a", "a")
    addrs = array("Q", [base + (s * NBLOCKS + 6) * SHARD + half for s in range(NSHARDS) for half in (0, 1000)])
    lens = array("Q", [1000, SHARD - 1000])
    store.dump_sg(whole, array("I", range(NSHARDS)), 1, addrs, lens).wait("stored")
    other = Engine()
    store.load(other.map(store), keys("a"), numbers(2)).wait()
    assert (other.bytes[:, 2] == engine.bytes[:, 6]).all()
    back = np.zeros(2 * SHARD, np.uint8)
    task = store.load_sg(keys("a"), numbers(1), 2, np.array([back.ctypes.data], np.uint64), np.array([2 * SHARD], np.uint64))
    task.wait()
    assert (back == engine.bytes[1:3, 6].ravel()).all()


def test_a_missing_block_is_its_own_failure(open_store, engine):
    store = open_store()
    map = engine.map(store)
    store.dump(map, keys("a"), numbers(0)).wait("stored")
    task = store.load(map, keys("x", "a", "y"), numbers(1, 2, 3))
    with pytest.raises(FileNotFoundError) as e:
        task.wait()
    assert e.value.strerror == ucm.strerror(errno.ENOENT)
    assert task.failed() == [0, 2] and [task.status(i) for i in range(3)] == [-errno.ENOENT, 0, -errno.ENOENT]
    for i in (3, -1):
        with pytest.raises(IndexError):
            task.status(i)


@pytest.mark.parametrize("make", [
    lambda v: np.array(v, np.uint32),
    lambda v: array("I", v),
    lambda v: memoryview(array("I", v)),
    lambda v: memoryview(np.array(v, np.uint32)).cast("B").cast("I"),
    lambda v: np.array([v], np.uint32),
    lambda v: pytest.importorskip("torch", reason="torch comes with an engine").tensor(v).int().numpy().view(np.uint32),
])  # fmt: skip
def test_block_numbers_in_any_uint32_buffer(open_store, engine, make):
    store = open_store()
    engine.fill(6)
    map = engine.map(store)
    store.dump(map, memoryview(keys("a", "b")), make([1, 2]), depths=make([0, 1])).wait("stored")
    store.load(map, bytearray(keys("a", "b")), make([8, 9])).wait()
    assert (engine.bytes[:, 8:10] == engine.bytes[:, 1:3]).all()


@pytest.mark.parametrize("blocks, error, why", [
    ([1, 2], TypeError, "^blocks: a contiguous buffer is needed, not <class 'list'>"),
    (b"12345678", TypeError, r"^blocks: uint32 items are needed, the buffer has format 'B' \(1 bytes\)"),
    (np.array([1, 2], np.int32), TypeError, "^blocks: uint32.*'i'"),
    (np.array([1, 2], np.uint64), TypeError, "^blocks: uint32"),
    (np.array([1, 2], np.float32), TypeError, "^blocks: uint32.*'f'"),
    (np.array([1, 2], ">u4"), TypeError, "^blocks: uint32.*'>I'"),
    (np.arange(4, dtype=np.uint32)[::2], ValueError, "^blocks: the buffer is not contiguous"),
    (numbers(1), ValueError, "^blocks: 1 items, 2 are needed"),
    (numbers(1, 2, 3), ValueError, "^blocks: 3 items, 2 are needed"),
    (numbers(1, NBLOCKS), ValueError, "^blocks, .*beyond the map's nblocks"),
    (numbers(1, 0xFFFFFFFF), ValueError, "^blocks, "),
])  # fmt: skip
def test_wrong_block_numbers(open_store, engine, blocks, error, why):
    store = open_store()
    map = engine.map(store)
    for call in (store.load, store.dump):
        with pytest.raises(error, match=why):
            call(map, keys("a", "b"), blocks)


@pytest.mark.parametrize("changes, error, why", [
    ({"keys": b"x" * 33}, ValueError, "^keys: 33 bytes is not a multiple of 16"),
    ({"keys": "x" * 32}, TypeError, "^keys: a contiguous buffer"),
    ({"depths": numbers(1)}, ValueError, "^depths: 1 items, 2 are needed"),
    ({"depths": b"xxxxxxxx"}, TypeError, "^depths: uint32"),
    ({"shard": -1}, ValueError, "^shard: -1 is out of range"),
    ({"nshards": 1 << 32}, ValueError, "^nshards: 4294967296 is out of range"),
    ({"shard": NSHARDS}, ValueError, "no such shards"),
    ({"shard": 1, "nshards": NSHARDS}, ValueError, "no such shards"),
    ({"map": None}, TypeError, "Map"),
    ({"shards": 1}, TypeError, "shards"),
])  # fmt: skip
def test_wrong_loads_and_dumps(open_store, engine, changes, error, why):
    store = open_store()
    good = {"map": engine.map(store), "keys": keys("a", "b"), "blocks": numbers(0, 1)}
    for call in (store.load, store.dump):
        with pytest.raises(error, match=why):
            call(**{**good, **changes})
    with pytest.raises(TypeError, match="group"):
        store.dump(**good, group=1)


@pytest.mark.parametrize("changes, error, why", [
    ({"keys": b"x" * 15}, ValueError, "^keys: 15 bytes"),
    ({"shards": numbers()}, ValueError, "^shards: 0 items, 1"),
    ({"shards": [0]}, TypeError, "^shards: "),
    ({"shards": numbers(NSHARDS)}, ValueError, "^shards, addrs: "),
    ({"nshards": 0}, ValueError, "^lens: "),
    ({"nshards": 2}, ValueError, "^lens: 4096 bytes in all, 2 shards of 4096"),
    ({"nshards": -1}, ValueError, "^nshards: "),
    ({"addrs": array("Q", [0])}, ValueError, "^shards, addrs: "),
    ({"addrs": array("Q", [1, 2])}, ValueError, "^addrs: 2 items, 1"),
    ({"addrs": array("I", [1])}, TypeError, "^addrs: uint64"),
    ({"lens": array("Q", [SHARD - 1])}, ValueError, "^lens: 4095 bytes"),
    ({"lens": array("Q", [])}, ValueError, "^addrs: 1 items, 0"),
    ({"depths": numbers(1, 2)}, ValueError, "^depths: 2 items, 1"),
])  # fmt: skip
def test_wrong_explicit_addresses(open_store, changes, error, why):
    store, memory = open_store(), np.zeros(SHARD, np.uint8)
    good = {"keys": keys("a"), "shards": numbers(0), "nshards": 1,
            "addrs": array("Q", [memory.ctypes.data]), "lens": array("Q", [SHARD])}  # fmt: skip
    for call in (store.load_sg, store.dump_sg):
        with pytest.raises(error, match=why):
            call(**{**good, **changes})


@pytest.mark.parametrize("segments, per_key, why", [
    ([], 1, "^segments: a sequence"),
    (7, 1, "^segments: a sequence"),
    ([[]] * NSHARDS, 1, "^segments: a sequence"),
    ([[(4096, SHARD, SHARD)]], 1, "^segments: 1 shards, the store has 4"),
    ([[(4096, SHARD, SHARD)]] * 3 + [[(4096, SHARD, SHARD)] * 2], 1, r"^segments\[3\]: not a sequence of 1"),
    ([[(4096, SHARD, SHARD)]] * 3 + [[(4096, SHARD)]], 1, r"^segments\[3\]\[0\]: \(address"),
    ([[(4096, SHARD, SHARD)]] * 3 + [[(-1, SHARD, SHARD)]], 1, r"^segments\[3\]\[0\]"),
    ([[(4096, SHARD, 4095)]] * NSHARDS, 1, r"^segments\[0\]: 4095 bytes over 1 blocks per key, a shard has 4096"),
    ([[(4096, SHARD, SHARD)]] * NSHARDS, 2, r"^segments\[0\]: 8192 bytes over 2"),
    ([[(0, SHARD, SHARD)]] * NSHARDS, 1, "has no address"),
    ([[(4096, SHARD, SHARD)]] * NSHARDS, -1, "^blocks_per_key: -1"),
    ([[(4096, SHARD, SHARD)]] * NSHARDS, 0, "blocks per key"),
])  # fmt: skip
def test_wrong_maps(open_store, segments, per_key, why):
    with pytest.raises(ValueError, match=why):
        open_store().map(segments, per_key, NBLOCKS)


def test_a_map_belongs_to_its_store(open_store, engine):
    one, two = open_store(), open_store(namespace="two")
    with pytest.raises(ValueError, match="^map: belongs to another store"):
        two.load(engine.map(one), keys("a"), numbers(0))
    map = engine.map(one)
    map.free()
    map.free()
    with pytest.raises(ValueError, match="^map: freed"):
        one.load(map, keys("a"), numbers(0))


def test_removed_names_what_was_evicted(open_store, engine):
    store = open_store(posix_capacity_gb=0.001)
    map, names = engine.map(store), [str(i) for i in range(200)]
    assert store.removed() == (b"", 0)
    for name in names:
        store.dump(map, keys(name), numbers(0)).wait("stored")
    gone, lost = store.removed()
    assert lost == 0 and gone
    assert [store.lookup(keys(name)) == b"\0" for name in names] == [
        keys(name) in {gone[i : i + 16] for i in range(0, len(gone), 16)} for name in names
    ]
    assert store.removed() == (b"", 0)
    with pytest.raises(OSError, match="not supported"):
        open_store(store_pipeline="Cache|Empty", cache_buffer_capacity_gb=0.01).removed()


def test_geometry_and_metrics(open_store, engine):
    store = open_store()
    assert (store.block_size, store.shard_size, store.nshards) == (NSHARDS * SHARD, SHARD, NSHARDS)
    assert open_store(shard_size=0, namespace="whole").nshards == 1
    store.dump(engine.map(store), keys("a"), numbers(0)).wait("stored")
    store.lookup(keys("a", "b"))
    got = store.metrics()
    assert (got["lookup_keys_total"], got["lookup_hits_total"], got["dump_blocks_total"]) == (2, 1, 1)
    assert all(isinstance(v, float) for v in got.values())


def test_inspect_sees_what_was_stored(open_store, engine, tmp_path):
    store = open_store()
    store.dump(engine.map(store), keys("a", "b"), numbers(0, 1)).wait("stored")
    (lane,) = ucm.inspect(tmp_path, verify=True)
    assert (lane["blocks"], lane["bad"], lane["live"], lane["shard_size"]) == (2, 0, True, SHARD)
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/none'"):
        ucm.inspect(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file'"):
        ucm.inspect(tmp_path / "file")


def test_inspect_wants_the_key_of_what_is_sealed(open_store, engine, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    try:
        store = open_store(integrity_key_file=str(key))
    except OSError as e:
        if "not in this build" in str(e):
            pytest.skip("built without libcrypto, so nothing can be sealed")
        raise
    store.dump(engine.map(store), keys("a", "b"), numbers(0, 1)).wait("stored")
    (lane,) = ucm.inspect(tmp_path)
    assert (lane["blocks"], lane["locked"]) == (0, True)
    conf = ucm.Conf({"integrity_key_file": str(key)})
    (lane,) = ucm.inspect(tmp_path, verify=True, conf=conf)
    assert (lane["blocks"], lane["bad"], lane["locked"]) == (2, 0, False)
    key.chmod(0o644)
    with pytest.raises(OSError, match=f"integrity_key_file: {key}: others than its owner may use it"):
        ucm.inspect(tmp_path, conf=conf)
    with pytest.raises(OSError, match="integrity_key_file: .*; chmod 600 it"):
        open_store(integrity_key_file=str(key))


@pytest.mark.parametrize("pipeline", ["Posix", "Cache|Posix"])
def test_a_directory_that_is_not_there_is_called_so(open_store, tmp_path, pipeline):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: No such file or directory; make"):
        open_store(store_pipeline=pipeline, storage_backends=str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is not a directory; give one"):
        open_store(store_pipeline=pipeline, storage_backends=str(tmp_path / "file"))


@pytest.mark.parametrize("kind", [ucm.Map, ucm.Task])
def test_only_stores_make_maps_and_tasks(kind):
    with pytest.raises(TypeError):
        kind()
