# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side by itself: what it asks of the store, and what it has loaded and saved."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from support import BLOCK, ENGINE, RATIO, geometry
from ucm.integration.vllm.messages import NULL_BLOCK, StepResult
from ucm.integration.vllm.scheduler import Policy, SchedulerSide


class Request:
    def __init__(self, name: str, tokens: int):
        self.request_id = name
        self.num_tokens = self.num_prompt_tokens = tokens
        self.num_output_tokens = 0
        self.block_hashes: list[bytes] = []
        self.extend(0)

    def extend(self, tokens: int) -> None:
        self.num_tokens += tokens
        for i in range(len(self.block_hashes), self.num_tokens // ENGINE):
            self.block_hashes.append(hashlib.sha256(f"{self.request_id} {i}".encode()).digest())

    def key(self, position: int, group: int = 0) -> bytes:
        key = self.block_hashes[(position + 1) * RATIO - 1][:16]
        return key[:15] + bytes([key[15] ^ group])


class FakeStore:
    """Knows keys and the tier of each."""

    def __init__(self):
        self.tiers: dict[bytes, int] = {}
        self.lookups = 0
        self.counted: list[str] = []
        self.asked: list[int] = []
        self.error: OSError | None = None

    def lookup(self, keys: bytes) -> bytes:
        self.lookups += 1
        self.asked.append(len(keys) // 16)
        if self.error:
            raise self.error
        return bytes(self.tiers.get(keys[i:i + 16], 0) for i in range(0, len(keys), 16))

    def count(self, name: str, n: int) -> None:
        self.counted += [name] * n

    def put(self, request: Request, positions, tier: int = 2, group: int = 0) -> None:
        self.tiers.update({request.key(p, group): tier for p in positions})


class Scheduler:
    """Plays vLLM's scheduler for one or more requests."""

    def __init__(self, stages: int = 1, windows: tuple[int, ...] = (0,), **policy):
        self.store = FakeStore()
        self.side = SchedulerSide(replace(geometry(), stages=stages, windows=windows), self.store, Policy(**{
            "loads": True, "saves": True, "asynchronous": windows != (0,), **policy}))
        self.groups = len(windows)
        self.tables: dict[str, tuple[list[int], ...]] = {}  # a request's engine blocks, of each group
        self.free = 1

    def admit(self, request: Request, local: int = 0) -> int:
        tokens = self.side.match(request, local).tokens
        count = -(-request.num_tokens // ENGINE)
        starts = [self.free + group * count for group in range(self.groups)]
        self.tables[request.request_id] = tuple(list(range(start, start + count)) for start in starts)
        self.free += count * self.groups
        self.side.admitted(request, self.tables[request.request_id], tokens)
        return local + tokens

    def step(self, *, new=(), running=(), resumed=(), preempted=(), **more):
        """Each of new and running: request, tokens computed before, tokens scheduled."""
        cached = [*running, *resumed]
        return self.side.step(SimpleNamespace(
            preempted_req_ids={r.request_id for r in preempted},
            num_scheduled_tokens={r.request_id: n for r, _, n in [*new, *cached]},
            total_num_scheduled_tokens=sum(n for _, _, n in [*new, *cached]),
            scheduled_new_reqs=[SimpleNamespace(req_id=r.request_id, block_ids=self.tables[r.request_id],
                                                num_computed_tokens=c) for r, c, _ in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r, _, _ in cached],
                resumed_req_ids={r.request_id for r, _, _ in resumed},
                new_block_ids=[None] * len(running) + [self.tables[r.request_id] for r, _, _ in resumed],
                num_computed_tokens=[c for _, c, _ in cached]), **more))

    def finish(self, request: Request) -> bool:
        return self.side.finished(request, self.tables[request.request_id])


def saved(step) -> dict[str, range]:
    return {s.req_id: range(s.positions[0], s.positions[0] + len(s)) for s in step.saves}


def test_a_waiting_request_is_looked_up_once():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(3))
    assert [s.side.match(r, 0).tokens for _ in range(200)] == [3 * BLOCK] * 200
    assert s.store.lookups == 1
    assert [s.side.match(r, 0).first_time for _ in range(2)] == [False, False]


def test_it_is_looked_up_again_when_it_has_grown_and_after_admission():
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    r.extend(200)
    s.store.put(r, range(9))
    assert s.side.match(r, 0).tokens == 9 * BLOCK
    s.admit(r)
    s.store.tiers.clear()
    assert s.side.match(r, 0).tokens == 0
    assert s.store.lookups == 3


def test_a_failing_store_is_a_miss(caplog):
    s, r = Scheduler(), Request("a", 1000)
    s.store.error = OSError(5, "broken")
    assert s.side.match(r, 0).tokens == 0
    r.extend(BLOCK)
    assert s.side.match(r, 0).tokens == 0
    assert s.store.lookups == 2


def test_figures_of_the_log_line():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(5))
    hit = s.side.match(r, 2 * BLOCK)
    assert (hit.total, hit.engine, hit.external) == (7, 2, 3)
    hit = s.side.match(Request("none", 1000), BLOCK + ENGINE)
    assert (hit.total, hit.engine, hit.external) == (7, 1, 0)


def test_one_token_is_left_to_compute():
    s, r = Scheduler(), Request("a", 4 * BLOCK)
    s.store.put(r, range(4))
    assert s.admit(r) == 4 * BLOCK - 1
    (load,) = s.step(new=[(r, 4 * BLOCK - 1, 1)]).loads
    assert (list(load.positions), len(load.blocks)) == ([0, 1, 2, 3], 4 * RATIO)


def test_a_whole_hit_is_not_saved_again():
    s, r = Scheduler(), Request("a", 4 * BLOCK)
    s.store.put(r, range(4))
    computed = s.admit(r)
    assert saved(s.step(new=[(r, computed, 1)])) == {}


def test_blocks_shared_with_another_request_are_not_written():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(5))
    local = 2 * BLOCK + 3 * ENGINE
    s.admit(r, local)
    (load,) = s.step(new=[(r, 5 * BLOCK, 100)]).loads
    (blocks,) = s.tables["a"]
    assert list(load.positions) == [2, 3, 4]
    assert list(load.blocks) == [NULL_BLOCK] * 3 + blocks[2 * RATIO + 3:5 * RATIO]
    assert load.keys == b"".join(map(r.key, range(2, 5)))


def test_tiers_add_up_to_the_tokens_loaded():
    s, r = Scheduler(), Request("a", 5 * BLOCK)
    s.store.put(r, range(2), tier=1)
    s.store.put(r, range(2, 5), tier=2)
    local = ENGINE
    tokens = s.admit(r, local) - local
    assert s.side.tiers_of(r, tokens) == (2 * BLOCK - ENGINE, 3 * BLOCK - 1)
    s = Scheduler(dram=False)
    assert s.side.tiers_of(r, tokens) == (0, tokens)


def test_chunked_prefill_saves_each_full_block_once():
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    first = s.step(new=[(r, 0, 300)])
    assert saved(first) == {"a": range(0, 2)}
    assert first.saves[0].keys == r.key(0) + r.key(1)
    assert list(first.saves[0].blocks) == s.tables["a"][0][:2 * RATIO]
    assert saved(s.step(running=[(r, 300, 50)])) == {}
    assert saved(s.step(running=[(r, 350, 650)])) == {"a": range(2, 7)}


def test_generated_tokens_are_saved_when_their_block_is_full():
    s, r = Scheduler(), Request("a", BLOCK - 1)
    s.admit(r)
    assert saved(s.step(new=[(r, 0, BLOCK - 1)])) == {}
    r.extend(1)
    assert saved(s.step(running=[(r, BLOCK - 1, 1)])) == {"a": range(0, 1)}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds
    return passes


def prefill(s: Scheduler, name: str, tokens: int, seconds: float, clock) -> None:
    """A prompt of 1000 tokens that is computed in steps of 500."""
    r = Request(name, tokens)
    s.admit(r)
    s.step(new=[(r, 0, tokens // 2)])
    clock(seconds / 2)
    s.step(running=[(r, tokens // 2, tokens - tokens // 2)])
    clock(seconds / 2)
    r.num_output_tokens = 1
    s.finish(r)


def test_a_load_may_take_twice_as_long_as_computing(clock):
    s = Scheduler()
    assert s.step().patience_ms == 0  # not known yet
    prefill(s, "a", 1000, 1.0, clock)
    assert s.step().patience_ms == pytest.approx(2 * BLOCK)
    prefill(s, "b", 1000, 10.0, clock)  # once
    prefill(s, "c", 1000, 1.0, clock)
    prefill(s, "short", 100, 50.0, clock)
    assert s.step().patience_ms == pytest.approx(2 * BLOCK)


def test_where_a_failed_load_fails_its_request_none_is_given_up_for_being_slow(clock):
    s = Scheduler(recomputes=False)
    prefill(s, "a", 1000, 1.0, clock)
    assert s.step().patience_ms == 0


def test_what_a_prompt_waits_for_its_load_is_no_computing(clock):
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    s.step(new=[(r, computed, 1000 - computed)])
    clock(100)
    r.num_output_tokens = 1
    assert s.step(running=[(r, 1000, 1)]).patience_ms == 0


def test_while_storage_is_late_only_dram_is_loaded_from(clock, caplog):
    for dram, found in ((True, 2 * BLOCK), (False, 0)):
        s, r = Scheduler(dram=dram), Request("a", 1000)
        s.store.put(r, range(2), tier=1)
        s.store.put(r, range(2, 5), tier=2)
        s.store.put(r, range(5, 6), tier=1)
        s.side.heard(StepResult("here", {"z": 0}, late=True))
        s.side.heard(StepResult("here", {"y": 0}, late=True))
        assert s.side.match(r, 0).tokens == found
        clock(31)
        assert s.side.match(r, 0).tokens == 6 * BLOCK
    assert caplog.text.count("only what is in DRAM") == 2


def test_guessed_tokens_are_not_saved():
    s, r = Scheduler(prompt_only=True), Request("a", BLOCK - 1)
    s.admit(r)
    s.step(new=[(r, 0, BLOCK - 1)])
    r.extend(1)
    assert saved(s.step(running=[(r, BLOCK - 1, 4)])) == {}


def test_blocks_in_the_engine_but_not_in_the_store_are_saved():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(1))
    s.admit(r, 3 * BLOCK)
    assert saved(s.step(new=[(r, 3 * BLOCK, 1000 - 3 * BLOCK)])) == {"a": range(1, 7)}


def test_what_another_connector_loads_is_not_saved():
    s, r = Scheduler(hears=False), Request("a", 1000)
    s.admit(r)
    assert saved(s.step(new=[(r, 3 * BLOCK, 300)])) == {}
    assert saved(s.step(running=[(r, 3 * BLOCK + 300, 316)])) == {"a": range(3, 7)}


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_computed_while_another_connector_loads_is_saved_when_that_went_well(fails):
    """It may have failed; and vLLM's own cache gives its blocks to others in the same step."""
    s, r, other = Scheduler(), Request("a", 1000), Request("b", 1000)
    s.admit(r), s.admit(other, 3 * BLOCK)
    step = s.step(new=[(r, 3 * BLOCK, 300), (other, 3 * BLOCK, 300)])
    assert step.settles and saved(step) == {}
    ahead = s.step(running=[(r, 684, 100), (other, 684, 100)])  # scheduled before that step was heard of
    assert not ahead.settles and saved(ahead) == {}
    s.side.heard(StepResult("here", {}, spoilt=step.seq if fails else -1, settled=step.seq))
    again = [(r, 784, 216), (other, 784, 216)] if not fails else [(r, 0, 400), (other, 0, 500)]
    assert saved(s.step(running=again)) == ({"a": range(3, 7), "b": range(0, 7)} if not fails else
                                       {"a": range(0, 3), "b": range(0, 3)})


def test_behind_a_wrapper_loads_wait_aside_and_windows_are_refused():
    """That of vllm-ascend does not pass on the pool, out of which what a failed load has left would be taken."""
    from ucm import config
    from ucm.integration.vllm import ucm_connector
    from ucm.integration.vllm.geometry import Unsupported

    def policy(module: str | None, window: int = 0, recovery: str = "recompute", **more):
        transfer = SimpleNamespace(kv_role="kv_both", kv_connector_module_path=module, kv_load_failure_policy=recovery)
        return ucm_connector._policy(config.from_extra_config({"storage_backends": "/tmp"}), SimpleNamespace(
            kv_transfer_config=transfer, parallel_config=SimpleNamespace(world_size=1), speculative_config=None, **more),
            replace(geometry(), windows=(window,)))

    assert not policy(ucm_connector.__name__).asynchronous and policy(None).asynchronous
    for ahead in {"use_v2_model_runner": True}, {"scheduler_config": SimpleNamespace(async_scheduling=True)}:
        # vLLM would compute what was lost again on counts of before, and what was not computed would be saved.
        assert policy(ucm_connector.__name__, **ahead).asynchronous
        assert not policy(ucm_connector.__name__, recovery="fail", **ahead).asynchronous
    assert policy(ucm_connector.__name__, 256)
    with pytest.raises(Unsupported, match="a wrapper may not pass on"):
        policy(None, 256)


def test_nobody_waits_to_hear_of_what_is_not_saved():
    for policy in ({"saves": False}, {"persist_token_threshold": 2000}, {"hears": False}):
        s, r = Scheduler(**policy), Request("a", 1000)
        s.admit(r)
        steps = [s.step(new=[(r, 3 * BLOCK, 100)]), s.step(running=[(r, 3 * BLOCK + 100, 100)])]
        assert not steps[1].settles, policy


def test_blocks_that_another_connector_failed_to_load_spoil_the_step():
    from ucm.integration.vllm.ucm_connector import UCMConnector

    heard = []
    scheduler = SimpleNamespace(heard=lambda result, bad: heard.append((result.spoilt, bad)))
    connector = SimpleNamespace(_scheduler=scheduler, _meter=SimpleNamespace(count=lambda name, n: None))
    for settled, bad in ((7, {3}), (7, set()), (-1, {3})):
        UCMConnector.update_connector_output(connector, SimpleNamespace(
            kv_connector_worker_meta=StepResult("here", {}, settled=settled), invalid_block_ids=bad))
    assert heard == [(7, {3}), (-1, set()), (-1, {3})]


def test_what_another_connector_failed_to_load_leaves_the_engines_own_cache():
    """vLLM takes it out for requests that are running; this one was aborted before that was known."""
    s = Scheduler()
    evicted = []
    s.side.bind(SimpleNamespace(evict_blocks=evicted.append))
    s.side.heard(StepResult("here", {}), {3, 4})
    assert evicted == [{3, 4}]


def test_only_a_load_in_the_step_itself_is_doubted():
    """What came before the step has come, or its request would not be computed."""
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    assert not s.step(new=[(r, 3 * BLOCK, 100)], has_sync_kv_loads=False).settles
    other = Request("b", 1000)
    s.admit(other)
    assert s.step(new=[(other, 3 * BLOCK, 100)], has_sync_kv_loads=True).settles


def test_a_doubt_that_nobody_answers_ends():
    """Whoever runs the workers may not hand on what they say: then that step is taken for spoilt, and no more."""
    from ucm.integration.vllm.scheduler import STEPS_IN_FLIGHT

    s, r = Scheduler(), Request("a", 3 * BLOCK)
    s.admit(r)
    assert s.step(new=[(r, BLOCK, 2 * BLOCK)]).settles
    assert s.side.finished(r, s.tables["a"]) and s.side._finished
    for _ in range(STEPS_IN_FLIGHT + 2):
        s.step()
    assert not s.side._finished and not s.side._doubtful and not s.side._unsettled


def test_no_sleep_while_a_request_that_goes_on_is_saved():
    """`sleep` may pause it, and then takes the memory of the KV cache away at once."""
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    step = s.step(new=[(r, 0, 300)])
    assert step.saves and not s.side.reset()
    s.side.heard(StepResult("here", {}, released=step.seq))
    assert s.side.reset()


def test_after_a_failed_load_the_lost_blocks_are_saved_again():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(6))
    assert s.admit(r) == 6 * BLOCK
    step = s.step(new=[(r, 6 * BLOCK, 232)])
    assert saved(step) == {"a": range(6, 7)}
    s.side.heard(StepResult("here", {"a": 2}, spoilt=step.seq))
    again = s.step(running=[(r, 2 * BLOCK, 1000 - 2 * BLOCK)])
    assert again.acked == step.seq
    assert saved(again) == {"a": range(2, 7)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_worker_that_can_only_name_engine_blocks(asynchronous):
    """As before vLLM 0.20."""
    s, r, other = Scheduler(asynchronous=asynchronous), Request("a", 1000), Request("b", 1000)
    s.store.put(r, range(6))
    s.store.put(other, range(2))
    s.admit(r), s.admit(other)
    step = s.step(new=[(r, 6 * BLOCK, 232), (other, 2 * BLOCK, 1)])
    s.side.lost(set(s.tables["a"][0][2 * RATIO + 1:]))
    again = s.step(running=[(r, 2 * BLOCK, 1000 - 2 * BLOCK), (other, 2 * BLOCK + 1, 200)])
    assert again.acked == (-1 if asynchronous else step.seq)
    assert saved(again) == {"a": range(2, 7), "b": range(2, 3)}


@pytest.mark.parametrize("aborted", [False, True])
def test_saves_that_a_failed_load_spoilt_are_made_up_for(aborted):
    """Requests computed beside the one whose load failed, which may be gone before that is heard of."""
    s, bad, good = Scheduler(), Request("bad", 1000), Request("good", 1000)
    s.store.put(bad, range(6))
    s.admit(bad), s.admit(good)
    step = s.step(new=[(bad, 6 * BLOCK, 232), (good, 0, 600)])
    ahead = s.step(running=[(good, 600, 100)])  # scheduled before the failure was known
    assert saved(step)["good"] == range(0, 4) and saved(ahead)["good"] == range(4, 5)
    if aborted:
        s.finish(bad)
    s.side.heard(StepResult("here", {"bad": 0}, spoilt=step.seq))
    assert saved(s.step(running=[(good, 700, 100)]))["good"] == range(0, 6)


def test_a_block_that_failed_is_not_tried_again_by_the_same_request():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(6))
    s.admit(r)
    s.side.heard(StepResult("here", {"a": 2}))
    computed = s.admit(r)
    assert computed == 2 * BLOCK
    # The store may not have noticed yet, and still say that it has them.
    assert saved(s.step(new=[(r, computed, 1000 - computed)])) == {"a": range(2, 7)}


def test_a_preempted_request_finds_what_it_has_saved():
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    s.step(new=[(r, 0, 1000)])
    s.store.put(r, range(7), tier=1)
    step = s.step(preempted=[r])
    assert step.preempted == {"a"}
    computed = s.admit(r)
    assert computed == 7 * BLOCK
    step = s.step(resumed=[(r, computed, 1000 - computed)])
    assert saved(step) == {} and len(step.loads) == 1


def test_blocks_are_kept_only_while_a_save_may_read_them():
    s, saving, idle, preempted = Scheduler(), Request("a", 1000), Request("b", 100), Request("c", 1000)
    for r in (saving, idle, preempted):
        s.admit(r)
    s.step(new=[(saving, 0, 1000), (idle, 0, 100), (preempted, 0, 1000)])
    s.step(preempted=[preempted])
    assert [s.finish(r) for r in (saving, idle, preempted)] == [True, False, False]
    assert s.step().held == {"a"}
    assert s.step().held == frozenset()
    assert s.finish(saving) is False


@pytest.mark.parametrize("ago, kept", [(0, False), (1, True)])
def test_blocks_that_no_save_reads_any_more_are_not_kept(ago, kept):
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    step = s.step(new=[(r, 0, 1000)])
    s.side.heard(StepResult("here", {}, released=step.seq - ago))
    assert s.finish(r) is kept and s.step().held == ({"a"} if kept else frozenset())


def test_workers_in_lockstep_save_nothing_that_a_load_of_another_may_have_spoilt():
    s, loading, beside = Scheduler(lockstep=True), Request("a", 1000), Request("b", 1000)
    s.store.put(loading, range(6))
    computed = s.admit(loading)
    s.admit(beside)
    step = s.step(new=[(loading, computed, 232), (beside, 0, 400)])
    assert step.loads and saved(step) == {}
    assert saved(s.step(running=[(beside, 400, 100)])) == {}  # scheduled before the load was heard of
    s.side.heard(StepResult("here", {}, settled=step.seq))
    assert saved(s.step(running=[(loading, 1000, 0), (beside, 500, 100)])) == {"a": range(6, 7), "b": range(0, 4)}


def test_workers_in_lockstep_save_what_went_well_while_the_next_load_is_under_way():
    s, busy = Scheduler(lockstep=True), Request("a", 1000)
    first, second = Request("b", 400), Request("c", 400)
    for r in (first, second):
        s.store.put(r, range(2))
    s.admit(busy)
    step = s.step(new=[(first, s.admit(first), 144), (busy, 0, 400)])
    s.side.heard(StepResult("here", {}, settled=step.seq))
    step = s.step(new=[(second, s.admit(second), 144)], running=[(busy, 400, 200)])
    assert step.loads and saved(step) == {"a": range(0, 3)}
    s.side.heard(StepResult("here", {"c": 0}, spoilt=step.seq, settled=step.seq))  # then it was not saved
    assert saved(s.step(running=[(busy, 600, 100)])) == {"a": range(0, 5)}


def test_workers_in_lockstep_save_though_every_step_loads():
    """And vLLM schedules one ahead, so that there is always a load which has not been heard of."""
    s, busy = Scheduler(lockstep=True), Request("a", 1000)
    s.admit(busy)
    steps = []
    for i in range(7):
        r = Request(f"{i}", 300)
        s.store.put(r, range(2))
        steps.append(s.step(new=[(r, s.admit(r), 44), *[(busy, 0, BLOCK)] * (i == 0)],
                            running=[(busy, i * BLOCK, BLOCK)] * (i > 0)))
        if i > 0:
            s.side.heard(StepResult("here", {}, settled=steps[i - 1].seq))
        if i == 4:
            assert s.finish(busy)
    assert [saved(step).get("a") for step in steps] == [None, None, *(range(i, i + 1) for i in range(5))]
    assert [step.held for step in steps] == [frozenset()] * 6 + [{"a"}]


class FakePool:
    def __init__(self):
        self.evicted: set[int] = set()

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted |= blocks


def test_what_a_spoilt_step_wrote_leaves_the_engines_own_cache():
    """vLLM takes it out for requests that are running; these are gone before it hears of the failure."""
    s, before, r, beside = Scheduler(), Request("a", 320), Request("b", 1000), Request("c", 320)
    s.side.bind(pool := FakePool())
    s.store.put(r, range(6))
    s.admit(before), s.admit(beside)
    s.step(new=[(before, 0, 320)])
    computed = s.admit(r)
    step = s.step(new=[(r, computed, 232)], running=[(before, 320, 0)])
    s.step(new=[(beside, 0, 320)])  # scheduled before the failure is heard of
    s.finish(r), s.finish(beside)
    s.side.heard(StepResult("here", {"b": 3}, spoilt=step.seq, settled=step.seq))
    assert pool.evicted == set(s.tables["b"][0]) | set(s.tables["c"][0])
    pool.evicted.clear()
    s.side.heard(StepResult("here", {"b": 3}, spoilt=step.seq, settled=step.seq))
    assert not pool.evicted and not s.side._written


def test_nothing_is_noted_of_steps_without_a_load_or_after_it_went_well():
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(2))
    step = s.step(new=[(r, s.admit(r), 100)])
    assert s.side._written
    s.side.heard(StepResult("here", {}, settled=step.seq))
    s.step(running=[(r, 356, 100)])
    assert not s.side._written


def test_what_a_finished_request_owes_is_saved_when_it_is_known_to_be_right():
    s, r = Scheduler(lockstep=True), Request("a", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    step = s.step(new=[(r, computed, 1000 - computed)])
    assert s.finish(r)
    assert saved(waiting := s.step()) == {} and not waiting.held
    s.side.heard(StepResult("here", {}, settled=step.seq))
    late = s.step()
    assert saved(late) == {"a": range(2, 7)} and late.held == {"a"}
    assert list(late.saves[0].blocks) == s.tables["a"][0][2 * RATIO:7 * RATIO]


def test_what_a_finished_request_owes_is_dropped_when_it_was_spoilt():
    s, r, other = Scheduler(lockstep=True), Request("a", 1000), Request("b", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    s.admit(other)
    step = s.step(new=[(r, computed, 1000 - computed), (other, 0, 1000)])
    assert s.finish(other)
    s.side.heard(StepResult("here", {"a": 0}, spoilt=step.seq, settled=step.seq))
    assert s.finish(r) is False  # as kv_load_failure_policy "fail" has it
    after = s.step()
    assert saved(after) == {} and after.held == {"b"}


def test_what_a_preempted_request_owed_is_forgotten():
    s, r = Scheduler(lockstep=True), Request("a", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    s.step(new=[(r, computed, 1000 - computed)])
    s.step(preempted=[r])
    assert s.finish(r) is False


def test_a_hit_is_what_all_stages_of_a_pipeline_have():
    s, r = Scheduler(stages=3), Request("a", 1000)
    first, second, third = s.store, FakeStore(), FakeStore()
    first.put(r, range(6), tier=1)
    second.put(r, range(4), tier=2)
    third.put(r, [0, 1, 2, 4], tier=1)
    first.put(early := Request("b", 1000), range(6))
    assert s.side.match(early, 0).tokens == 0  # not all have told what they are
    assert first.counted == ["lookup_refused_total"]
    for stage, store in ((0, None), (1, second), (2, third)):
        s.side.add_stage(stage, f"stage {stage}", lambda store=store: store)
    s.admit(r)
    (load,) = s.step(new=[(r, 3 * BLOCK, 1000 - 3 * BLOCK)]).loads
    assert len(load) == 3 and s.side.tiers_of(r, 3 * BLOCK) == (0, 3 * BLOCK)
    assert (second.asked, third.asked) == ([6], [4])  # what one lacks is not asked of the next


@pytest.mark.parametrize("parallel, rank, place", [
    ({}, 0, (0, 1, 0, 1, 128, True)),
    ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, 5, (1, 4, 1, 2, 128, True)),
    ({"tensor_parallel_size": 2, "prefill_context_parallel_size": 2, "pipeline_parallel_size": 2}, 7,
     (3, 4, 1, 2, 128, True)),
    ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, 1, (1, 4, 0, 1, 128, True)),
    ({"tensor_parallel_size": 4, "copies": 4}, 2, (0, 1, 0, 1, 128, False)),
    ({"tensor_parallel_size": 4, "copies": 2}, 2, (1, 2, 0, 1, 128, True)),
])
def test_where_a_worker_stands(parallel, rank, place):
    """Its part of a block, and of how many; its stage; whether it is the one to save that part."""
    g = derived(rank=rank, **parallel)
    assert (g.rank, g.ranks, g.stage, g.stages, g.block_tokens, g.saves) == place


def test_forms_that_differ_in_bytes_share_nothing_and_others_do():
    forms = [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
             {"tensor_parallel_size": 4}, {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2, "rank": 1}]
    assert len({derived(**form).namespace for form in forms}) == len(forms)
    assert derived(tensor_parallel_size=4, copies=4).namespace == derived().namespace


@pytest.mark.parametrize("kind, more", [
    ("SlidingWindowMLASpec", {"sliding_window": 256}), ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 256}),
    ("RSWASpec", {"rswa_window": 256}), ("SinkFullAttentionSpec", {"sink_len": 4}), ("HiddenStateCacheSpec", {}),
    ("CrossAttentionSpec", {}), ("FullAttentionSpec", {"tokens_per_state": 4}),
    ("MambaSpec", {"shapes": ((4, 64),), "dtypes": (torch.float32,)})])
def test_kinds_of_attention_that_are_not_served_are_refused(kind, more):
    from ucm.integration.vllm.geometry import Unsupported

    with pytest.raises(Unsupported, match=f"full and sliding-window attention .* this model's KV cache is {kind}"):
        derived(kind=kind, more=more)


def test_models_that_differ_in_a_norm_alone_are_told_apart(tmp_path):
    from safetensors.torch import save_file
    from ucm.integration.vllm.geometry import sample_weights

    def weights(name: str, norm: float) -> str:
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.ones(1 << 20), "norm": torch.full((64,), norm), "z.weight": torch.ones(1 << 20)},
                  tmp_path / name / "model.safetensors")
        return sample_weights(tmp_path / name)

    assert weights("first", 1) == weights("same", 1) != weights("other", 2)


def test_whose_model_is_the_same(tmp_path):
    """A model_id stands for path, name, revision, configuration and weights; without one all but the path count."""
    from safetensors.torch import save_file

    def namespace(model_id: str, path: str, revision: str | None = None, weight: float = 1, hidden: int = 64) -> str:
        if not path.startswith("hub/"):
            path = str(tmp_path / path / str(weight))
            os.makedirs(path, exist_ok=True)
            save_file({"weight": torch.full((64,), weight)}, f"{path}/model.safetensors")
        return derived(model_id=model_id, model={"model": path, "revision": revision, "hf_config": SimpleNamespace(
            to_dict=lambda: {"hidden_size": hidden})}).namespace

    others = [{"path": "b"}, {"revision": "v2"}, {"weight": 2}, {"hidden": 128}, {"path": "hub/x"}, {"path": "hub/y"}]
    for other in others:
        other = {"path": "a", **other}
        assert namespace("one", **other) == namespace("one", "a") != namespace("two", **other)
    assert namespace("", "b") == namespace("", "a")
    assert len({namespace("", "a"), *(namespace("", **{"path": "a", **other}) for other in others)}) == len(others)


def derived(rank: int = 0, copies: int = 1, kind: str | list[str] = "FullAttentionSpec", more: dict = {},
            speculative: object = None, model_id: str = "model", model: dict = {}, **parallel: int):
    """kind: of one group, or of each; more: what is said of it, or of each kind; model: of its ModelConfig."""
    from ucm.integration.vllm.geometry import derive
    from vllm.v1 import kv_cache_interface as kinds

    sizes = dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size",
                           "decode_context_parallel_size", "cp_kv_cache_interleave_size"), 1)
    said = {kind: more} if isinstance(kind, str) else more
    common = {"block_size": ENGINE, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}

    def spec(kind: str):
        known = {f.name: common[f.name] for f in fields(getattr(kinds, kind)) if f.name in common}
        return getattr(kinds, kind)(**{**known, **said.get(kind, {})})

    groups = [kinds.KVCacheGroupSpec([f"{i}.0", f"{i}.1"], spec(k))
              for i, k in enumerate([kind] if isinstance(kind, str) else kind)]
    return derive(
        SimpleNamespace(parallel_config=SimpleNamespace(rank=rank, **{**sizes, **parallel}),
                        device_config=SimpleNamespace(device_type="cpu"), speculative_config=speculative,
                        model_config=SimpleNamespace(dtype="float32", quantization=None, **model),
                        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto")),
        SimpleNamespace(kv_cache_groups=groups, kv_cache_layout="LBHNC", kv_tp_replicas=copies), 128, model_id)


def test_what_failed_is_not_offered_again_by_an_older_lookup():
    """Preempted, looked up while there was no room for it, and only then heard of."""
    s, r = Scheduler(), Request("a", 1000)
    s.store.put(r, range(6))
    assert s.admit(r) == s.side.match(r, 0).tokens == 6 * BLOCK
    s.side.heard(StepResult(geometry().namespace, {"a": 2}))
    assert s.side.match(r, 0).tokens == 2 * BLOCK


def test_a_producer_delivers_when_a_prompt_ends():
    s, r, short = Scheduler(loads=False, delivers=True), Request("a", 1000), Request("b", 100)
    s.admit(r), s.admit(short)
    assert [s.step(new=[(r, 0, 600)]).deliver, s.step(running=[(r, 600, 400)]).deliver] == [False, True]
    r.extend(1)
    assert not s.step(running=[(r, 1000, 1)]).deliver
    assert s.step(new=[(short, 0, 100)]).deliver  # nothing of its own to save, but perhaps of others


def test_who_is_no_producer_never_waits_for_storage():
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    assert not s.step(new=[(r, 0, 1000)]).deliver


@pytest.mark.parametrize("policy, tokens, saves", [
    ({"saves": False}, 2 * BLOCK, {}),
    ({"loads": False}, 0, {"a": range(2, 7)}),
    ({"persist_token_threshold": 1001}, 0, {}),
    ({"persist_token_threshold": 1000}, 2 * BLOCK, {"a": range(2, 7)}),
    ({"load_tokens_threshold": 2 * BLOCK + 1}, 0, {"a": range(2, 7)}),
    ({"hit_ratio": 0.2}, BLOCK, {"a": range(2, 7)}),
])
def test_policy(policy, tokens, saves):
    s, r = Scheduler(**policy), Request("a", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    assert computed == tokens
    step = s.step(new=[(r, computed, 1000 - computed)])
    assert len(step.loads) == (tokens > 0)
    assert saved(step) == saves


@pytest.mark.parametrize("windows", [(0,), (0, 200)])
def test_after_a_reset_nothing_of_before_is_found(windows):
    """By this engine, whichever group it asks for and whoever waits; what it saves then, no other finds."""
    s, r = Scheduler(windows=windows), Request("a", 1000)
    s.side.bind(SimpleNamespace(blocks={i: None for i in range(1000)}, touch=lambda blocks: None))
    for group in range(len(windows)):
        s.store.put(r, range(7), group=group)
    assert s.side.match(r, 0).tokens == 7 * BLOCK
    s.side.reset()
    assert s.side.match(r, 0).tokens == 0
    s.admit(r)
    (save,) = s.step(new=[(r, 0, 1000)]).saves
    keys = {save.keys[i:i + 16] for i in range(0, len(save.keys), 16)}
    assert len(keys) == len(save) and keys.isdisjoint(s.store.tiers)
    assert s.side.prompt_keys(r) == b"".join(map(r.key, range(7)))  # traces tell of prompts
    s.store.tiers.update(dict.fromkeys(keys, 2))
    again, other = Request("a", 1000), Scheduler(windows=windows)
    again.request_id, other.store.tiers = "again", dict.fromkeys(keys, 2)
    assert s.side.match(again, 0).tokens == 7 * BLOCK
    assert other.side.match(again, 0).tokens == 0
    s.side.reset()  # the next change of weights
    assert s.side.match(again, 0).tokens == 0


def test_who_runs_through_a_reset_saves_nothing_more_until_it_begins_anew():
    """What it computes on is of before; what it is saving is read to the end."""
    s, r = Scheduler(), Request("a", 1000)
    s.admit(r)
    s.step(new=[(r, 0, 600)])
    s.side.reset()
    assert saved(s.step(running=[(r, 600, 400)])) == {}
    s.step(preempted=[r])
    s.admit(r)
    assert saved(s.step(resumed=[(r, 0, 600)])) == {"a": range(0, 4)}
    s.side.reset()
    assert s.finish(r) and s.step().held == {"a"}


def test_what_a_finished_request_owed_before_a_reset_is_dropped():
    s, r = Scheduler(lockstep=True), Request("a", 1000)
    s.store.put(r, range(2))
    computed = s.admit(r)
    step = s.step(new=[(r, computed, 1000 - computed)])
    assert s.finish(r)
    s.side.reset()
    s.side.heard(StepResult("here", {}, settled=step.seq))
    after = s.step()
    assert saved(after) == {} and after.held == {"a"}
