# SPDX-License-Identifier: Apache-2.0
"""The life of stores, maps and tasks: in any order, from any thread, across fork, until the last exit."""

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from helpers import Engine, keys, numbers

import ucm

CACHE = {"store_pipeline": "Cache|Posix", "cache_buffer_capacity_gb": 0.01}
# A device that takes its time: copies move this long after they were queued.
SLOW = {**CACHE, "store_pipeline": "Cache|Empty", "device": "sim", "sim_delay_us": 300000}


def in_thread(fn):
    """Runs fn in a thread; the result is a call that joins it and returns what fn returned or raised."""
    box = []

    def run():
        try:
            box.append(fn())
        except BaseException as e:
            box.append(e)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(60)
        assert not thread.is_alive()
        return box[0]

    return result


def in_time(attempt, store, engine):
    """attempt(task) is true of a dump that is under way, unless this process stands still for longer than the
    device takes: so it has some more tries."""
    map = engine.map(store)
    assert any(attempt(store.dump(map, keys(i), numbers(0))) for i in range(10))


def test_waiting_lets_other_threads_run(open_store, engine):
    def attempt(task):
        waiting, turns = threading.Event(), 0
        result = in_thread(lambda: (waiting.set(), task.wait("released"))[1])
        waiting.wait()
        while not task.done():
            turns += 1
        assert result() is None
        return turns > 0

    in_time(attempt, open_store(**SLOW), engine)


def test_a_wait_can_time_out_and_go_on(open_store, engine):
    def attempt(task):
        number = 0
        try:
            task.wait(timeout_ms=0)
        except TimeoutError as e:
            number = e.errno
        seen = number, task.status(0), task.failed()
        task.wait()
        task.wait()
        assert task.done()
        return seen == (errno.ETIMEDOUT, -errno.EINPROGRESS, [])

    in_time(attempt, open_store(**SLOW), engine)


def test_signals_reach_a_wait(open_store, engine):
    import signal

    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    def attempt(task):
        with pytest.raises(Alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            task.wait()
            signal.pause()  # a wait that keeps signals back ends here
        early = not task.done()
        task.wait()
        return early

    before = signal.signal(signal.SIGALRM, ring)
    try:
        in_time(attempt, open_store(**{**SLOW, "sim_delay_us": 900000}), engine)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_close_finishes_a_dump_under_way(open_store, engine, options):
    store = open_store(**CACHE, device="sim", sim_delay_us=100000)
    engine.fill(1)
    task = store.dump(engine.map(store), keys("a"), numbers(0))
    store.close()
    assert open_store().lookup(keys("a")) == b"\1"
    with pytest.raises(ValueError, match="closed"):
        task.wait()


def test_close_ends_the_waits_of_other_threads(open_store, engine):
    store = open_store(**SLOW)
    map = engine.map(store)
    store.dump(map, keys("a"), numbers(0)).wait("stored")
    task = store.load(map, keys("a"), numbers(1))
    waiting = threading.Event()
    result = in_thread(lambda: (waiting.set(), task.wait())[1])
    waiting.wait()
    store.close()
    assert result() is None or isinstance(result(), (OSError, ValueError))


def test_what_is_left_of_a_closed_store_says_so(open_store, engine):
    store = open_store()
    map = engine.map(store)
    task = store.dump(map, keys("a"), numbers(0))
    store.close()
    store.close()
    calls = [
        lambda: store.lookup(keys("a")), lambda: store.lookup_prefix(keys("a")), lambda: store.prefetch(keys("a")),
        store.removed,
        lambda: store.load(map, keys("a"), numbers(0)), lambda: store.dump(map, keys("a"), numbers(0)),
        lambda: store.map(engine.segments, 1, 1), store.metrics, store.__enter__, task.wait, task.done, task.failed,
        task.cancel, lambda: task.status(0), lambda: task.wait_shard(0), lambda: len(task),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="^Store: closed"):
            call()
    map.free()
    assert store.closed and store.block_size


def test_with_closes(options):
    with ucm.Store(options) as store:
        assert store.lookup(keys("a")) == b"\0"
    assert store.closed


class ClosesAsNumber:
    def __init__(self, store):
        self.store = store

    def __index__(self):
        self.store.close()
        return 0


class ClosesAsBuffer(ClosesAsNumber):
    def __buffer__(self, flags):
        self.store.close()
        return memoryview(numbers(0))


@pytest.mark.parametrize("kind, where", [(ClosesAsNumber, "shard"), (ClosesAsBuffer, "blocks"), (ClosesAsBuffer, "depths")])
def test_an_argument_that_closes_the_store(open_store, engine, kind, where):
    """Reading arguments can run Python code, and so anything."""
    if kind is ClosesAsBuffer and sys.version_info < (3, 12):
        pytest.skip("buffers written in Python come with 3.12")
    store = open_store()
    arguments = {"map": engine.map(store), "keys": keys("a"), "blocks": numbers(0), where: kind(store)}
    with pytest.raises(ValueError, match="closed"):
        store.load(**arguments)


@pytest.mark.parametrize("order", ["task map store", "store map task", "map task store", "map store task"])
def test_objects_go_in_any_order(options, order):
    things = {"store": ucm.Store({**options, **SLOW})}
    engine = Engine().fill(1)
    things["map"] = engine.map(things["store"])
    things["task"] = things["store"].dump(things["map"], keys("a"), numbers(0))
    for name in order.split():
        del things[name]
    gc.collect()


def test_a_dropped_task_with_addresses_of_its_own(options):
    """The vectors it was given are read by the core long after it is gone."""
    memory = np.random.default_rng(1).integers(0, 256, (4, 4096), np.uint8)
    with ucm.Store({**options, **CACHE, "device": "sim", "sim_delay_us": 50000}) as store:
        for i in range(8):
            addrs = np.array([row.ctypes.data for row in memory], np.uint64)
            store.dump_sg(keys(i), numbers(0), 4, addrs, np.full(4, 4096, np.uint64))
            del addrs
    with ucm.Store(options) as store:
        back = np.zeros((8, 4, 4096), np.uint8)
        whole = back.ctypes.data + np.arange(8, dtype=np.uint64) * 16384
        store.load_sg(keys(*range(8)), np.zeros(8, np.uint32), 4, whole, np.array([16384], np.uint64)).wait()
    assert (back == memory).all()


def test_closing_while_other_threads_use_the_store(options):
    many = np.random.default_rng(1).bytes(16 << 16)
    for _ in range(10):
        store = ucm.Store(options)
        engine = Engine()
        map = engine.map(store)
        go = threading.Barrier(4)

        def look():
            go.wait()
            while True:
                store.lookup(many)

        def move():
            go.wait()
            while True:
                store.dump(map, keys("a"), numbers(0)).wait("stored")

        results = [in_thread(look), in_thread(look), in_thread(move)]
        go.wait()
        store.lookup(many)
        store.close()
        assert [str(r()) for r in results] == ["Store: closed"] * 3


def test_freeing_a_map_while_other_threads_use_it(open_store):
    store, engine, many = open_store(store_pipeline="Fake"), Engine(), 20000
    for _ in range(20):
        map = engine.map(store)
        begun = threading.Event()

        def move():
            while True:
                store.load(map, bytes(16 * many), np.zeros(many, np.uint32))
                begun.set()

        results = [in_thread(move), in_thread(move)]
        begun.wait()
        map.free()
        assert [str(r()) for r in results] == ["map: freed"] * 2


def test_nothing_leaks_references(options, engine):
    store, conf, name, blocks = ucm.Store(options), ucm.Conf(options), keys("a"), numbers(0)
    map = engine.map(store)

    def use():
        store.dump(map, name, blocks).wait("stored")
        store.load(map, name, blocks).failed()
        store.lookup(name)
        conf.options()
        for call in (lambda: store.load(map, name[:3], blocks), lambda: store.load(map, name, name), store.lookup):
            with pytest.raises((TypeError, ValueError)):
                call()

    use()
    things = (store, map, conf, name, blocks)
    before = [sys.getrefcount(thing) for thing in things]
    for _ in range(10):
        use()
    assert [sys.getrefcount(thing) for thing in things] == before
    store.close()


# ---- processes ----

PRELUDE = """
import os, sys, threading
import numpy as np
import ucm
options = eval(sys.argv[1])
store = ucm.Store(options)
memory = np.zeros((4, 16, 4096), np.uint8)
base = memory.ctypes.data
map = store.map([[(base + i * 65536, 4096, 4096)] for i in range(4)], 1, 16)
key, zero = b"k" * 16, np.zeros(1, np.uint32)

def wait(task):
    try:
        task.wait("stored")
    except ValueError:  # closed before it began to wait
        pass
"""


def run(code, options):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), repr(options)],
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip


@pytest.mark.parametrize("stack", [{}, CACHE], ids=["Posix", "Cache|Posix"])
@pytest.mark.parametrize("code", [
    "task = store.dump(map, key, zero)",
    "store.dump(map, key, zero); del map",
    "keep = [store, store.dump(map, key, zero)]; keep.append(keep); del store",
    "task = store.dump(map, key, zero); threading.Thread(target=wait, args=(task,), daemon=True).start()",
    "import atexit; atexit.register(store.close); store.dump(map, key, zero)",
    "ucm.log_to(lambda *a: None, 3); store.dump(map, key, zero); sys.exit(0)",
])  # fmt: skip
def test_exit_without_closing_anything(options, code, stack):
    r = run(code, {**options, **stack})
    assert (r.returncode, r.stderr) == (0, "")
    with ucm.Store(options) as store:
        assert store.lookup(b"k" * 16) == b"\1", "a dump under way at the exit was not finished"


def test_exit_with_large_dumps_under_way(options):
    """Memory goes when modules are torn down; nobody may still be reading it then."""
    r = run(
        """
        big = np.ones((64, 1 << 20), np.uint8)
        store = ucm.Store({**options, "block_size": 1 << 20, "shard_size": 0})
        map = store.map([[(big.ctypes.data, 1 << 20, 1 << 20)]], 1, 64)
        store.dump(map, bytes(range(64)) * 16, np.arange(64, dtype=np.uint32))
        """,
        options,
    )
    assert (r.returncode, r.stderr) == (0, "")


def test_a_child_of_fork_can_neither_use_nor_hang_on_its_parents_store(options):
    r = run(
        """
        task = store.dump(map, key, zero)
        pid = os.fork()
        if pid == 0:
            try:
                store.lookup(key)
            except ValueError as e:
                print(e)
            store.close()
            del task, map, store
            ucm.Conf({"posix_gc_enable": True})
            print("child ends", flush=True)
            sys.exit(0)
        print(os.waitpid(pid, 0)[1])
        task.wait("stored")
        store.close()
        """,
        options,
    )
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines() == [
        "Store: opened by another process; a store does not survive fork()", "child ends", "0",
    ]  # fmt: skip
    assert "posix_gc_enable" in r.stderr, "the child's log line"


def test_a_child_of_fork_opens_its_own(options):
    r = run(
        """
        pid = os.fork()
        if pid == 0:
            del map, store
            store = ucm.Store(options)
            map = store.map([[(base + i * 65536, 4096, 4096)] for i in range(4)], 1, 16)
            store.dump(map, key, zero).wait("stored")
            store.close()
            sys.exit(0)
        print(os.waitpid(pid, 0)[1], store.lookup(key))
        """,
        options,
    )
    assert r.returncode == 0 and r.stdout == "0 b'\\x01'\n", r.stderr
