# SPDX-License-Identifier: Apache-2.0
"""The documented store interface."""

import errno
import itertools
import sys
import types

import numpy as np
import pytest

import ucm
from ucm.store.factory_v1 import UcmConnectorFactoryV1
from ucm.store.nfsstore.connector import UcmNfsStore
from ucm.store.pipeline.connector import UcmPipelineStore
from ucm.store.ucmstore_v1 import UcmKVStoreBaseV1

SHARD, NSHARDS = 4096, 2
IDS = [bytes([i]) * 16 for i in range(1, 9)]


class Tensor:
    """What the store asks of a CPU tensor of torch."""

    def __init__(self, array, device="cpu"):
        self.array, self.device = array, types.SimpleNamespace(type=device)

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def data_ptr(self):
        return self.array.ctypes.data

    def is_contiguous(self):
        return self.array.flags.c_contiguous


def test_a_devices_tensors_are_waited_for(make, monkeypatch):
    """A copy must not overtake what the engine has queued on the device; nothing is queued on the CPU."""
    recorded, store, tensor = [], make(), Tensor(np.zeros(SHARD, np.uint8), "cuda")

    class Event:
        event_id = 77

        def __init__(self, device):
            self.device = device

        def record(self):
            recorded.append(self.device)

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Event=Event))
    seen = []
    monkeypatch.setattr(store, "_submit", lambda *args: seen.append(args))
    for store._host in (False, True):
        for call in (store.dump, store.load):
            tensor.device.type = "cpu" if store._host else "cuda"
            call(IDS[:1], [0], [[tensor]])
    assert [args[-1] for args in seen] == [77, 77, 0, 0] and recorded == [tensor.device] * 2
    assert all(isinstance(args[-2][-1], Event) for args in seen[:2])


@pytest.fixture
def config(tmp_path):
    return {
        "store_pipeline": "Posix",
        "storage_backends": [str(tmp_path)],
        "block_size": NSHARDS * SHARD,
        "shard_size": SHARD,
        # what engines say to every store
        "device_id": -1,
        "unique_id": "an engine",
        "local_rank_size": 1,
        "tensor_size_list": [SHARD // 4, SHARD * 3 // 4],
    }


@pytest.fixture
def make(config):
    stores = []

    def make(cls=UcmPipelineStore, **changes):
        stores.append(cls({**config, **changes}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def tensors(seed, n):
    """A row of two tensors for each of n shards."""
    r = np.random.default_rng(seed)
    return [[Tensor(r.integers(0, 256, size, np.uint8)) for size in (SHARD // 4, SHARD * 3 // 4)] for _ in range(n)]


def equal(a, b):
    return all((x.array == y.array).all() for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True))


def both(ids):
    """Each id with both of its shards."""
    return [i for i in ids for _ in range(NSHARDS)], list(range(NSHARDS)) * len(ids)


def test_tensors_round_trip(make):
    store, rows, back = make(), tensors(1, 4), tensors(2, 4)
    store.wait(store.dump(*both(IDS[:2]), rows))
    task = store.load(*both(IDS[:2]), back)
    store.wait(task)
    assert store.check(task) is True and equal(rows, back)


def test_one_task_per_shard(make):
    """As layerwise engines store: a block is there when all its shards are, in whatever order."""
    store, rows = make(), tensors(1, NSHARDS)
    tasks = [store.dump([IDS[0]], [s], [rows[s]]) for s in reversed(range(NSHARDS))]
    for task in tasks:
        store.wait(task)
    assert store.lookup(IDS[:2]) == [True, False]
    back = tensors(2, NSHARDS)
    store.wait(store.load(*both(IDS[:1]), back))
    assert equal(rows, back)


@pytest.mark.parametrize("form", [list, lambda rows: np.array(rows, np.uint64)])
def test_addresses_round_trip(make, form):
    store, rows, back = make(), tensors(1, 2), tensors(2, 2)
    addresses = [form([[t.data_ptr() for t in row] for row in r]) for r in (rows, back)]
    store.wait(store.dump_data(*both(IDS[:1]), addresses[0], prerequisite_handle=0))
    store.wait(store.load_data(*both(IDS[:1]), addresses[1]))
    assert equal(rows, back)


def test_equal_parts_when_no_sizes_were_given(make):
    store = make(tensor_size_list=None)
    source, back = np.random.default_rng(1).integers(0, 256, (2, NSHARDS, 4, SHARD // 4), np.uint8)
    rows = [[[part.ctypes.data for part in shard] for shard in memory] for memory in (source, back)]
    store.wait(store.dump_data(*both(IDS[:1]), rows[0]))
    store.wait(store.load_data(*both(IDS[:1]), rows[1]))
    assert (source == back).all()


def test_lookups_are_exact(make):
    store = make()
    stored = [IDS[1], IDS[3]]
    store.wait(store.dump(*both(stored), tensors(1, 4)))
    assert store.lookup(IDS[:5]) == [False, True, False, True, False]
    assert store.lookup_on_prefix(IDS[:5]) == -1
    assert store.lookup_on_prefix([IDS[1], IDS[3], IDS[0]]) == 1
    assert store.lookup([]) == [] and store.lookup_on_prefix([]) == -1
    store.prefetch(IDS)


@pytest.mark.parametrize("wrong", [b"x" * 15, b"x" * 17, b""])
def test_an_id_of_the_wrong_length_is_named(make, wrong):
    store, ids = make(), [IDS[0], wrong, IDS[1]]
    row = tensors(1, 1)
    for call in (store.lookup, store.lookup_on_prefix, store.prefetch,
                 lambda ids: store.load(ids, [0] * 3, row * 3), lambda ids: store.dump(ids, [0] * 3, row * 3)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^block_ids\[1\]: {len(wrong)} bytes"):
            call(ids)


def test_a_failure_is_a_runtime_error_and_a_task_is_waited_for_once(make):
    store = make()
    task = store.load(*both(IDS[:1]), tensors(1, 2))
    with pytest.raises(RuntimeError, match=ucm.strerror(errno.ENOENT)) as e:
        store.wait(task)
    assert isinstance(e.value.__cause__, OSError) and e.value.__cause__.errno == errno.ENOENT
    assert store.check(task) is True
    with pytest.raises(RuntimeError, match="already"):
        store.wait(task)


def test_tensors_live_until_their_dump_has_read_them(make, config):
    store = make(store_pipeline="Cache|Posix", cache_buffer_capacity_gb=0.01, device="sim", sim_delay_us=50000)
    rows = tensors(1, NSHARDS)
    want = [[Tensor(t.array.copy()) for t in row] for row in rows]
    before = sys.getrefcount(rows[0][0])
    task = store.dump(*both(IDS[:1]), rows)
    assert sys.getrefcount(rows[0][0]) > before
    rows.clear()
    store.wait(task)
    back = tensors(2, NSHARDS)
    store.wait(store.load(*both(IDS[:1]), back))
    assert equal(want, back)


def row_with(tensor):
    return [[tensor, tensors(1, 1)[0][1]]]


@pytest.mark.parametrize("rows, why", [
    (row_with(Tensor(np.zeros(1024, np.uint8), "cuda")), r"\[0\]\[0\]: on .*CPU tensors"),
    (row_with(Tensor(np.zeros(2048, np.uint8)[::2])), r"\[0\]\[0\]: not contiguous"),
    (row_with(Tensor(np.zeros(1023, np.uint8))), "4095 bytes in a row, a shard has 4096"),
])  # fmt: skip
def test_wrong_tensors(make, rows, why):
    store = make()
    for call in (store.load, store.dump):
        with pytest.raises(ValueError, match=why):
            call(IDS[:1], [0], rows)


@pytest.mark.parametrize("rows, error, why", [
    (np.zeros((1, 2), np.int32), TypeError, "^addrs: uint64"),
    (np.zeros((1, 2), np.int64), TypeError, "^addrs: uint64"),
    (np.zeros((1, 4), np.uint64)[:, ::2], ValueError, "not contiguous"),
    (np.zeros(2, np.uint64), ValueError, "1 dimensions"),
    (np.zeros((2, 2), np.uint64), ValueError, "^addrs: 4 items, 2"),
    (np.zeros((1, 3), np.uint64), ValueError, "3 addresses in a row"),
    ([[1, 2], [1]], ValueError, r"dst_addr\[1\]: 1 addresses"),
    ([[0, 0]], ValueError, "an address is 0"),
])  # fmt: skip
def test_wrong_addresses(make, rows, error, why):
    with pytest.raises(error, match=why):
        make().load_data(IDS[:1], [0], rows)


def test_other_shapes_never_mix(make):
    one = make()
    one.wait(one.dump(*both(IDS[:1]), tensors(1, 2)))
    for changes in ({"tensor_size_list": [SHARD]}, {"shard_size": SHARD * 2, "tensor_size_list": None}):
        assert make(**changes).lookup(IDS[:1]) == [False]
    assert make(unique_id="another engine", device_id=0).lookup(IDS[:1]) == [True]


@pytest.mark.parametrize("changes, error, why", [
    ({"storage_backend": "x"}, OSError, "did you mean storage_backends"),
    ({"tensor_size": 1000}, ValueError, "tensor_size: 1000 does not divide"),
    ({"tensor_size_list": [1]}, ValueError, "tensor_size_list: 1 bytes in all"),
    ({"block_size": 0}, OSError, "block_size: 0"),
])  # fmt: skip
def test_wrong_configurations(make, changes, error, why):
    with pytest.raises(error, match=why):
        make(**changes)


def test_the_factory(config):
    config.pop("store_pipeline")
    config["cache_buffer_capacity_gb"] = 0.01
    create = UcmConnectorFactoryV1.create_connector
    for name, kind in (("UcmPipelineStore", UcmPipelineStore), ("UcmNfsStore", UcmNfsStore)):
        store = create(name, config)
        assert type(store) is kind and isinstance(store, UcmKVStoreBaseV1)
        store.close()
    store = create("UcmPipelineStore", config, "ucm.store.pipeline.connector")
    store.close()
    with pytest.raises(ValueError, match="Unsupported connector type: 'UcmStore'; there are UcmNfsStore"):
        create("UcmStore", config)
    with pytest.raises(TypeError, match="no class Conf derived"):
        create("Conf", config, "ucm")
    with pytest.raises(ValueError, match="registered already"):
        UcmConnectorFactoryV1.register_connector("UcmNfsStore", "x", "y")


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError):
        UcmKVStoreBaseV1({})
