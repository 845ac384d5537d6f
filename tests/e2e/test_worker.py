# SPDX-License-Identifier: Apache-2.0
"""The worker's side by itself: what it holds on to, what it reports, what it must not save."""

from __future__ import annotations

from array import array

import pytest
import torch
from support import ENGINE, RATIO, geometry
from ucm.integration.vllm.messages import NULL_BLOCK, Step, StepResult, Transfer
from ucm.integration.vllm.pace import SHORTEST_MS
from ucm.integration.vllm.worker import IO_BYTES, LATE_MS, WorkerSide


class FakeTask:
    def __init__(self, released: bool, failed=(), stuck: bool = False, slow: bool = False, shard_error=None, error=5):
        self.released, self.bad, self.stuck, self.slow = released, list(failed), stuck, slow
        self.shard_error, self.shards, self.error = shard_error, [], error
        self.cancelled, self.waits, self.stored = False, 0, False
        self.patience: list[int] = []  # how long each wait for STORED might have taken

    def wait(self, stage, timeout_ms):
        self.waits += 1
        if stage == "stored":
            self.patience.append(timeout_ms)
            self.stored = not self.slow
        if not self.stuck:
            self.released = True
        if self.bad or not self.done(stage):
            raise OSError(110, "timed out")

    def wait_shard(self, shard, timeout_ms):
        self.shards.append(shard)
        if self.shard_error:
            raise self.shard_error

    def done(self, stage):
        return self.stored if stage == "stored" else self.released

    def failed(self):
        return self.bad

    def status(self, i):
        return -self.error if i in self.bad else 0

    def cancel(self):
        self.cancelled = True


class FakeStore:
    """Gives out the tasks it was told to; an exception in place of a task is raised."""

    def __init__(self):
        self.next: list = []
        self.dumps: list[tuple] = []
        self.loads: list[tuple] = []
        self.groups: list[int] = []
        self.timeouts: list[int] = []
        self.events: list[int] = []

    def _give(self, default):
        task = self.next.pop(0) if self.next else default
        if isinstance(task, Exception):
            raise task
        return task

    def dump(self, where, keys, blocks, depths, after):
        self.events.append(after)
        task = self._give(FakeTask(released=False))
        self.dumps.append((keys, list(blocks), list(depths), task))
        return task

    def load(self, where, keys, blocks, depths, group, after, timeout_ms):
        self.events.append(after)
        task = self._give(FakeTask(released=False))
        self.loads.append((keys, list(blocks), list(depths), task))
        self.groups.append(group)
        self.timeouts.append(timeout_ms)
        return task

    def map(self, segments, blocks_per_key, nblocks):
        return "map"


def engine(name: str, first: int, count: int) -> range:
    """The engine's blocks in which a request has these of its blocks."""
    base = 1 + 1000 * (ord(name) - ord("a"))
    return range(base + first * RATIO, base + (first + count) * RATIO)


def transfer(name: str, first: int, count: int, skip: int = 0) -> Transfer:
    """The first `skip` of the engine's blocks are not wanted."""
    blocks = array("I", engine(name, first, count))
    blocks[:skip] = array("I", [NULL_BLOCK] * skip)
    return Transfer(name, array("I", range(first, first + count)),
                    b"".join(bytes([i]) * 16 for i in range(first, first + count)), blocks)


class Worker:
    def __init__(self, asynchronous=False, delivers=False, timeout_ms=10, layers=1, load_timeout_ms=0, marks=None):
        self.store = FakeStore()
        self.side = WorkerSide(geometry(layers), self.store, 1000, asynchronous, timeout_ms, delivers,
                               load_timeout_ms, marks)
        self.layers = [str(i) for i in range(layers)]
        self.side.register({name: torch.zeros(1000, 4096 // RATIO, dtype=torch.uint8) for name in self.layers})
        self.seq = 0

    def step(self, loads=(), saves=(), acked=-1, preempted=(), held=(), idle=False, deliver=False, asked=None,
             patience_ms=0, settles=False):
        """One step as vLLM drives it, in which the model asks for these layers: what was reported."""
        self.seq += 1
        step = Step(self.seq, acked, list(loads), list(saves), frozenset(preempted), frozenset(held), idle,
                    deliver, patience_ms, settles)
        self.side.preempted(step.preempted)
        self.side.begin(step)
        self.side.load()
        for name in self.layers if asked is None else asked:
            self.side.wait_for_layer(name)
        self.side.save()
        sent, received = self.side.transfers_done()
        return sent, received, self.side.bad_blocks(), self.side.result()


def test_the_saves_of_a_step_are_one_dump():
    w = Worker()
    w.step(saves=[transfer("a", 2, 2), transfer("b", 0, 1)])
    ((keys, blocks, depths, task),) = w.store.dumps
    assert len(keys) == 3 * 16 and depths == [2, 3, 0]
    assert blocks == [*engine("a", 2, 2), *engine("b", 0, 1)]
    assert task.waits == 0


def test_a_request_is_not_reported_before_the_save_of_the_same_step_has_begun():
    """With a draft model vLLM asks for reports first: what a finished request owed is saved after that."""
    w = Worker()
    w.side.begin(Step(1, -1, [], [transfer("a", 0, 1)], held=frozenset("a")))
    w.side.load()
    assert w.side.transfers_done() == (None, None)
    w.side.save()
    assert w.side.transfers_done() == (None, None)
    w.store.dumps[0][3].released = True
    assert w.side.transfers_done() == ({"a"}, None)


def test_a_finished_request_is_reported_when_its_saves_are_released():
    w = Worker()
    w.step(saves=[transfer("a", 0, 1)])
    task = w.store.dumps[0][3]
    assert w.step(held=["a", "b"])[0] == {"b"}
    assert w.step()[0] is None
    task.released = True
    assert w.step()[0] == {"a"}
    assert w.step()[0] is None


def test_the_scheduler_is_told_until_it_knows_that_saves_are_over():
    w = Worker()
    w.store.next = [FakeTask(released=False)]
    assert w.step(saves=[transfer("a", 0, 1)])[3].released == 0
    assert w.step()[3].released == 0
    w.store.dumps[0][3].released = True
    assert w.step()[3].released == 3
    assert w.step()[3] is None


def test_preemption_waits_for_the_saves_of_that_request():
    w = Worker()
    w.step(saves=[transfer("a", 0, 1)])
    w.step(saves=[transfer("b", 0, 1)])
    w.step(preempted=["a"])
    assert [d[3].waits for d in w.store.dumps] == [1, 0]


def test_a_wrapper_need_not_tell_of_preemptions():
    w = Worker()
    w.step(saves=[transfer("a", 0, 1)])
    w.side.begin(Step(2, -1, [], preempted=frozenset("a")))
    assert w.store.dumps[0][3].waits == 1


def test_memory_that_is_never_released_ends_the_engine():
    w = Worker()
    w.store.next = [FakeTask(released=False, stuck=True)]
    w.step(saves=[transfer("a", 0, 1)])
    with pytest.raises(RuntimeError, match="still holds engine memory"):
        w.step(preempted=["a"])
    assert w.store.dumps[0][3].cancelled


def test_a_full_queue_drops_the_save():
    w = Worker()
    w.store.next = [BlockingIOError(11, "queue full")]
    w.step(saves=[transfer("a", 0, 1)])
    assert w.step(held=["a"])[0] == {"a"}


def test_a_producer_delivers_all_it_has_saved_before_it_answers():
    w = Worker(delivers=True, timeout_ms=60000)
    w.step(saves=[transfer("a", 0, 1)])
    w.step(saves=[transfer("b", 0, 1)])
    w.store.dumps[0][3].released = True  # not enough for who is to load it elsewhere
    assert [d[3].waits for d in w.store.dumps] == [0, 0]
    w.step(saves=[transfer("a", 1, 1)], deliver=True)
    assert [d[3].stored for d in w.store.dumps] == [True] * 3
    w.step(deliver=True)
    assert [d[3].waits for d in w.store.dumps] == [1] * 3


def test_storage_that_is_late_does_not_hold_up_every_answer(caplog):
    w = Worker(delivers=True, timeout_ms=60000)
    w.store.next = [FakeTask(released=True, slow=True), FakeTask(released=True, slow=True)]
    for position in range(4):
        w.step(saves=[transfer("a", position, 1)], deliver=True)
    first, second, third, fourth = (d[3].patience for d in w.store.dumps)
    assert first[0] > 50000 and max(second + third) <= LATE_MS and fourth[0] > 50000
    assert caplog.text.count("were not stored within") == 1


def test_a_load_streams_and_each_layer_waits_for_its_own_part():
    w = Worker(layers=3)
    waits = []
    w.store.next = [FakeTask(released=False)]
    task = w.store.next[0]
    task.wait_shard = lambda shard, timeout_ms: waits.append((shard, task.waits))
    w.step(loads=[transfer("a", 0, 2), transfer("b", 0, 1)])
    assert waits == [(0, 0), (1, 0), (2, 0)] and task.waits == 1  # the whole is waited for after the layers
    assert len(w.store.loads) == 1 and w.store.groups == [IO_BYTES // 4096]
    w.step(saves=[transfer("a", 2, 1)])
    assert len(waits) == 3


def test_a_layer_that_uses_anothers_blocks_waits_for_nothing():
    w = Worker(layers=2)
    assert w.step(loads=[transfer("a", 0, 1)], asked=["0", "1", "shared"])[2] == set()
    assert w.store.loads[0][3].shards == [0, 1]


def test_nothing_is_saved_or_reported_while_the_load_of_the_step_goes_on():
    """The order of vLLM with a draft model: reports are asked for before wait_for_save."""
    for first in (WorkerSide.save, WorkerSide.transfers_done):
        w = Worker()
        w.side.begin(Step(1, -1, [transfer("a", 0, 1)], [transfer("a", 1, 1)]))
        w.side.load()
        w.side.wait_for_layer("0")
        task = w.store.loads[0][3]
        assert not task.released
        first(w.side)
        assert task.released


class EndsWhenCancelled(FakeTask):
    """A load whose second block never comes."""

    def __init__(self):
        super().__init__(released=False, failed=[1], stuck=True)

    def cancel(self):
        self.cancelled = self.released = True


@pytest.mark.parametrize("task", [FakeTask(released=False), EndsWhenCancelled()], ids=["it ends", "it is cancelled"])
def test_memory_of_who_is_aborted_while_its_load_streams_is_not_written_after_its_step(task):
    """vLLM frees it at once, and the next step may give it to another: by then the load has let go of it.  Who shares
    the load and the step loses nothing."""
    w = Worker(layers=3)
    w.store.next = [task]
    w.side.begin(Step(1, -1, [transfer("a", 0, 2), transfer("b", 0, 1)], [transfer("b", 1, 1)]))
    w.side.load()
    w.side.wait_for_layer("0")
    assert not task.released  # here "a" is aborted
    for layer in ("1", "2"):
        w.side.wait_for_layer(layer)
    w.side.save()
    assert task.released
    bad, result = w.side.bad_blocks(), w.side.result()
    if task.cancelled:
        assert bad == set(engine("a", 1, 1)) and result.failed == {"a": 1} and result.spoilt == 1
    else:
        assert bad == set() and result.failed == {} and len(w.store.dumps) == 1
    other = transfer("c", 0, 2)
    other.blocks = array("I", engine("a", 0, 2))
    assert w.step(loads=[other], saves=[transfer("b", 1, 1)], acked=result.spoilt)[2] == set()
    assert w.store.loads[1][1] == list(engine("a", 0, 2)) and w.store.dumps[-1][1] == list(engine("b", 1, 1))


def test_a_layer_that_comes_late_is_not_computed_on_while_it_comes():
    w = Worker()
    w.store.next = [FakeTask(released=False, failed=[1], shard_error=TimeoutError(110, "late"))]
    w.side.begin(Step(1, -1, [transfer("a", 0, 2)]))
    w.side.load()
    w.side.wait_for_layer("0")
    assert w.store.loads[0][3].released  # all of it has ended, one way or the other
    w.side.save()
    assert w.side.bad_blocks() == set(engine("a", 1, 1))


def test_a_model_that_does_not_ask_for_its_layers_is_seen_and_waited_for():
    w = Worker(layers=3)
    _, _, bad, result = w.step(loads=[transfer("a", 0, 2)], saves=[transfer("a", 2, 1)], asked=["0", "2"])
    assert bad == set(engine("a", 0, 2)) and result.spoilt == 1 and w.store.dumps == []
    w.side.begin(Step(2, 1, [transfer("a", 0, 2)]))
    w.side.load()
    assert w.store.loads[1][3].released
    w.side.save()
    assert w.side.bad_blocks() == set()


def test_a_step_without_a_forward_asks_for_no_layer():
    w = Worker(layers=3)
    assert w.step(loads=[transfer("a", 0, 2)], asked=[], idle=True)[2] == set()
    assert w.store.loads[0][3].released


def test_a_load_may_take_as_long_as_is_worth_it():
    for asynchronous in (False, True):
        w = Worker(asynchronous)
        w.step(loads=[transfer("a", 0, 2)])
        w.step(loads=[transfer("a", 0, 2), transfer("b", 0, 1)], patience_ms=1000.0)
        w.step(loads=[transfer("a", 0, 1)], patience_ms=0.1)
        # Beside others that are under way it takes longer, by so much as these do.
        assert w.store.timeouts == ([0, 4000, 5000, SHORTEST_MS] if asynchronous else [0, 3000, SHORTEST_MS])
    w = Worker(load_timeout_ms=7)
    w.step(loads=[transfer("a", 0, 2)], patience_ms=1000.0)
    assert w.store.timeouts == [7]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_scheduler_hears_of_loads_that_were_late(asynchronous):
    w = Worker(asynchronous)
    for error, late in ((110, True), (5, False)):
        w.store.next = [FakeTask(released=True, failed=[0, 1], error=error)]
        assert w.step(loads=[transfer("a", 0, 2)])[3].late == late


def test_failed_blocks_of_each_request_from_the_first_on():
    w = Worker()
    w.store.next = [FakeTask(released=False, failed=[1, 4])]
    _, received, bad, result = w.step(loads=[transfer("a", 0, 3), transfer("b", 2, 2, skip=1)])
    assert bad == {*engine("a", 1, 2), *engine("b", 3, 1)}
    assert result.failed == {"a": 1, "b": 3} and received is None


def test_blocks_of_others_are_not_reported():
    w = Worker()
    w.store.next = [FakeTask(released=False, failed=[0])]
    _, _, bad, _ = w.step(loads=[transfer("a", 0, 1, skip=3)])
    assert bad == set(engine("a", 0, 1)[3:])


def test_nothing_is_saved_from_a_failed_load_until_the_scheduler_knows():
    w = Worker()
    w.store.next = [FakeTask(released=False, failed=[0])]
    _, _, _, result = w.step(loads=[transfer("a", 0, 1)], saves=[transfer("a", 1, 1), transfer("b", 0, 1)])
    w.step(saves=[transfer("b", 1, 1)])
    assert w.store.dumps == [] and result.spoilt == 1
    w.step(saves=[transfer("b", 0, 2)], acked=1)
    assert len(w.store.dumps) == 1


def test_a_step_that_the_scheduler_waits_to_hear_of_is_reported_as_settled():
    """By all workers, whether its load has failed or it has none."""
    w = Worker()
    w.step()
    assert w.step()[3] is None
    assert w.step(loads=[transfer("a", 0, 1)], settles=True)[3].settled == 3
    assert w.step(settles=True)[3].settled == 4


def test_what_the_workers_say_is_put_together():
    one, other = StepResult("here", {"a": 3}, 1, False, 1), StepResult("here", {"a": 2, "b": 4}, -1, True, 1)
    assert one.aggregate(other) == StepResult("here", {"a": 2, "b": 4}, 1, True, 1)


def test_a_load_that_cannot_begin_is_a_miss():
    for asynchronous in (False, True):
        w = Worker(asynchronous)
        w.store.next = [BlockingIOError(11, "queue full")]
        _, received, bad, result = w.step(loads=[transfer("a", 0, 2)])
        assert bad == set(engine("a", 0, 2)) and result.failed == {"a": 0}
        assert received == ({"a"} if asynchronous else None)


def test_asynchronous_loads_are_reported_one_by_one():
    w = Worker(asynchronous=True)
    w.step(loads=[transfer("a", 0, 2), transfer("b", 0, 2)])
    first, second = (load[3] for load in w.store.loads)
    second.released, second.bad = True, [1]
    _, received, bad, result = w.step()
    assert received == {"b"} and bad == set(engine("b", 1, 1)) and result.failed == {"b": 1}
    first.released = True
    _, received, bad, result = w.step(saves=[transfer("b", 1, 1)])
    assert received == {"a"} and bad == set() and result.failed == {}
    assert len(w.store.dumps) == 1  # such a failure spoils no step


def test_an_idle_engine_sleeps_until_a_load_ends():
    w = Worker(asynchronous=True)
    w.step(loads=[transfer("a", 0, 1)])
    assert w.step(idle=True)[1] == {"a"}
    assert w.store.loads[0][3].waits == 1


@pytest.mark.parametrize("tensors, form", [
    ([torch.zeros(1000, ENGINE, 2, 16, dtype=torch.uint8).transpose(1, 2)], "NHC"),
    ([torch.zeros(1000, ENGINE, 2, 8, dtype=torch.uint8)] * 2, "NHC, K and V apart"),
    ([torch.zeros(2, 1000, 2, ENGINE, 8, dtype=torch.uint8)], "HNC, K and V apart"),
    ([torch.zeros(1000, 2, ENGINE, 16, dtype=torch.uint8)], None)])
def test_tensors_in_another_form_than_the_scheduler_thinks_are_refused(tensors, form):
    from ucm.integration.vllm.geometry import Unsupported

    given = tensors[0] if len(tensors) == 1 else tuple(t.clone() for t in tensors)
    side = WorkerSide(geometry(), FakeStore(), 1000, False, 10)
    if form is None:
        side.register({"0": given})
        return
    with pytest.raises(Unsupported, match=f"are {form}, vLLM's configuration says HNC: this attention backend"):
        side.register({"0": given})


def test_graphs_of_whole_steps_only_where_no_layer_waits():
    from ucm.integration.vllm.ucm_connector import UCMConnector

    for layerwise in (True, False):
        options = {"storage_backends": "/nowhere", "use_layerwise": layerwise}
        assert UCMConnector.requires_piecewise_for_cudagraph(options) == layerwise
