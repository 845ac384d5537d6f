# SPDX-License-Identifier: Apache-2.0
"""KV cache events follow what a lookup would find (ucm/integration/vllm/events.py)."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from models import prompt
from support import BLOCK, RATIO, geometry
from test_bookkeeping import FakeStore, Request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Events of a store that knows what it is told."""

    def __init__(self, blocks: int = 3):
        from ucm.integration.vllm.events import Events

        self.store, self.clock = FakeStore(), Clock()
        self.removed = b""
        self.events = Events(geometry(), self.store.lookup, lambda: self.removed, "STORAGE", self.clock)
        self.request = Request("a", blocks * BLOCK)
        self.request.all_token_ids, self.request.lora_request = list(range(blocks * BLOCK)), None

    def save(self, first: int, end: int) -> None:
        self.events.saved(self.request, first, b"".join(self.request.key(p) for p in range(first, end)))

    def take(self, seconds: float = 1) -> list:
        """The kind of each event, and its hashes."""
        self.clock.now += seconds
        return [(type(e).__name__.removeprefix("Block"), list(e.block_hashes)) for e in self.events.take()]

    def hashes(self, position: int) -> list:
        from ucm.integration.vllm import compat

        return [compat.event_hash(h) for h in self.request.block_hashes[position * RATIO:(position + 1) * RATIO]]


def test_a_block_is_announced_when_it_can_be_loaded():
    w = Watched()
    w.save(0, 2)
    assert w.take() == []
    w.store.put(w.request, [1])
    assert w.take() == [("Stored", w.hashes(1))]
    w.store.put(w.request, [0])
    assert w.take() == [("Stored", w.hashes(0))]
    assert w.take() == []


def test_an_event_says_what_the_engines_own_would():
    w = Watched()
    w.save(1, 2)
    w.store.put(w.request, [1])
    w.clock.now += 1
    [event] = w.events.take()
    assert event.parent_block_hash == w.hashes(0)[-1] and event.medium == "STORAGE"
    assert event.token_ids == list(range(BLOCK, 2 * BLOCK)) and event.block_size * RATIO == BLOCK
    w.save(0, 1)
    w.store.put(w.request, [0])
    w.clock.now += 1
    assert [e.parent_block_hash for e in w.events.take()] == [None]


def test_what_is_evicted_is_taken_back_once_and_announced_anew():
    w = Watched()
    w.save(0, 3)
    w.store.put(w.request, range(3))
    assert len(w.take()) == 3
    del w.store.tiers[w.request.key(1)]
    assert w.take() == [("Removed", w.hashes(1))]
    assert w.take() == []
    w.store.put(w.request, [1])
    w.save(1, 2)
    assert w.take() == [("Stored", w.hashes(1))]


def test_what_storage_names_is_taken_back_at_once():
    w = Watched()
    w.save(0, 3)
    w.store.put(w.request, range(3))
    w.take()
    w.removed = w.request.key(2) + bytes(16)  # and another's
    del w.store.tiers[w.request.key(2)]
    w.events._look_again = list
    assert w.take() == [("Removed", w.hashes(2))]
    assert w.take() == []


def test_what_is_never_stored_is_forgotten():
    w = Watched()
    w.save(0, 1)
    w.take()
    w.take(61)
    w.store.put(w.request, [0])
    assert w.take() == [] and w.events.forgotten == 1


def test_of_too_many_that_are_waited_for_the_oldest_are_forgotten(monkeypatch):
    from ucm.integration.vllm import events

    monkeypatch.setattr(events, "MOST", 2)
    w = Watched()
    w.save(0, 3)
    w.store.put(w.request, range(3))
    assert w.take() == [("Stored", w.hashes(1)), ("Stored", w.hashes(2))] and w.events.forgotten == 1


def test_what_is_forgotten_is_counted_once():
    from ucm.integration.vllm.stats import Meter
    from ucm.integration.vllm.ucm_connector import UCMConnector

    w = Watched()
    w.events.forgotten = 2
    w.store.metrics = dict
    connector = SimpleNamespace(_meter=Meter(w.store, "0"), _scheduler=SimpleNamespace(events=w.events))
    for _ in range(2):
        UCMConnector.take_events(connector)
    assert connector._meter.take().data == {"0": {"events_forgotten_total": 2}}


def test_after_a_reset_all_that_was_announced_is_taken_back():
    """And what waited to be announced never is."""
    w = Watched()
    w.save(0, 2)
    w.store.put(w.request, range(2))
    w.take()
    w.save(2, 3)
    w.events.reset()
    w.store.put(w.request, [2])
    assert w.take() == [("Removed", w.hashes(0) + w.hashes(1))]
    assert w.take() == []
    w.save(0, 1)
    assert w.take() == [("Stored", w.hashes(0))]


def test_a_look_is_bounded_and_nothing_is_left_out():
    from ucm.integration.vllm.events import LOOKS

    w = Watched(3 * LOOKS)
    w.save(0, 3 * LOOKS)
    w.store.put(w.request, range(3 * LOOKS))
    assert sum(len(w.take()) for _ in range(3)) == 3 * LOOKS
    assert max(w.store.asked) == LOOKS
    w.store.tiers.clear()
    assert sum(len(hashes) for _ in range(4) for _, hashes in w.take()) == 3 * LOOKS * RATIO


def test_nothing_is_announced_that_no_lookup_finds():
    """Of a pipeline whose stages have not all told what they are."""
    from test_bookkeeping import Scheduler

    s, r = Scheduler(stages=2), Request("a", 3 * BLOCK)
    s.store.put(r, range(3))
    s.store.peek = s.store.lookup
    assert s.side._peek(r.key(0) + r.key(1)) == bytes(2)
    s.side.add_stage(1, "there", lambda: s.store)
    assert s.side._peek(r.key(0) + bytes(16)) == b"\2\0"


def test_what_is_too_much_is_taken_back(monkeypatch):
    from ucm.integration.vllm import events

    monkeypatch.setattr(events, "MOST", 2)
    w = Watched()
    for position in range(3):
        w.save(position, position + 1)
        w.store.put(w.request, [position])
        told = w.take()
    assert ("Removed", w.hashes(0)) in told


def test_looks_are_rare():
    w = Watched()
    w.save(0, 1)
    w.take()
    asked = len(w.store.asked)
    assert w.take(0.01) == [] and len(w.store.asked) == asked


@pytest.mark.parametrize("given", [True, False])
def test_an_engine_publishes_them(deploy, tmp_path, given):
    """What the engine hands to its publisher, seen by a subscriber."""
    import msgspec
    import zmq
    from vllm.distributed.kv_events import KVEventBatch

    socket = zmq.Context.instance().socket(zmq.SUB)
    connected = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.connect(f"ipc://{tmp_path}/events")
    socket.subscribe("")
    d = deploy()
    options = {"kv_events": f"ipc://{tmp_path}/events"} if given else {}
    with d.life(**options) as life:
        assert not given or connected.poll(60000)  # what is published before that is lost
        life.call("ask", [prompt(600, 1)])
        life.call("save")
        stored = []
        until = time.monotonic() + 120
        while given and sum(len(e.token_ids) for e in stored) < 4 * BLOCK and time.monotonic() < until:
            life.call("ask", [prompt(20, 2)])  # events come with steps
            while socket.poll(200):
                batch = msgspec.msgpack.decode(socket.recv_multipart()[-1], type=KVEventBatch)
                stored += [e for e in batch.events if type(e).__name__ == "BlockStored" and e.medium == "STORAGE"]
    assert [t for e in stored for t in e.token_ids] == (prompt(600, 1)[:4 * BLOCK] if given else [])
