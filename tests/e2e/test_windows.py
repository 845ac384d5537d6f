# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that see a window only, on the scheduler's and the worker's side by themselves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import BLOCK, ENGINE, RATIO, geometry
from test_bookkeeping import Request, Scheduler, derived
from test_worker import FakeTask, Worker, transfer
from ucm.integration.vllm.messages import NULL_BLOCK, Step, StepResult

WINDOW = 256  # after 7 blocks, of 128 tokens, the last two are needed


class Pool:
    """vLLM's."""

    def __init__(self):
        self.blocks = [SimpleNamespace(number=i, ref_cnt=1) for i in range(1000)]

    def touch(self, blocks):
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks):
        for block in blocks:
            block.ref_cnt -= 1

    def pinned(self) -> set[int]:
        return {block.number for block in self.blocks if block.ref_cnt == 2}


def scheduler(windows=(0, WINDOW), **policy) -> tuple[Scheduler, Request, Pool]:
    s, pool = Scheduler(windows=windows, **policy), Pool()
    s.side.bind(pool)
    return s, Request("a", 1000), pool


def moved(transfers) -> list[tuple[int, bytes, list[int]]]:
    """Of each block: position, key, the engine's blocks."""
    return [(position, t.keys[16 * i:16 * i + 16], list(t.blocks[i * RATIO:(i + 1) * RATIO]))
            for t in transfers for i, position in enumerate(t.positions)]


def block(s: Scheduler, r: Request, position: int, group: int) -> tuple[int, bytes, list[int]]:
    table = s.tables[r.request_id][group]
    return position, r.key(position, group), table[position * RATIO:(position + 1) * RATIO]


# ---- which blocks ----

def test_of_a_window_only_what_is_in_it_is_looked_up_and_loaded():
    s, r, _ = scheduler()
    s.store.put(r, range(7))
    s.store.put(r, [5, 6], group=1)
    assert s.admit(r) == 7 * BLOCK
    assert s.store.asked == [7, 2]
    loads = s.step().loads
    assert moved(loads) == [block(s, r, p, 0) for p in range(7)] + [block(s, r, p, 1) for p in (5, 6)]
    assert s.side.tiers_of(r, 7 * BLOCK) == (0, 7 * BLOCK)


@pytest.mark.parametrize("there, hit", [
    (range(6), 6), ([2, 3, 4, 6], 5), ([0, 6], 1), ([1, 2, 3, 5], 4), ([6], 0), ([], 0), (range(7), 7)])
def test_a_hit_ends_where_its_window_is_there(there, hit):
    s, r, _ = scheduler()
    s.store.put(r, range(7))
    s.store.put(r, there, group=1)
    assert s.side.match(r, 0).tokens == hit * BLOCK
    # What is in the window, and if that is not enough everything before it at once.
    assert s.store.asked == [7, 2, 5][:2 if hit == 7 else 3]


def test_what_full_attention_lacks_is_not_looked_up_for_windows():
    s, r, _ = scheduler(windows=(WINDOW, 0, WINDOW))
    s.store.put(r, range(7), group=0)
    s.store.put(r, range(7), group=2)
    assert s.side.match(r, 0).tokens == 0 and s.store.asked == [7]


def test_every_group_has_a_word():
    s, r, _ = scheduler(windows=(0, WINDOW, 0, 2 * WINDOW))
    for group, there in enumerate((range(7), range(6), range(5), [*range(1, 7)])):
        s.store.put(r, there, group=group)
    assert s.side.match(r, 0).tokens == 5 * BLOCK


def test_a_model_of_windows_only():
    s, r, _ = scheduler(windows=(WINDOW,))
    s.store.put(r, [5, 6])
    assert s.admit(r) == 7 * BLOCK
    assert moved(s.step().loads) == [block(s, r, p, 0) for p in (5, 6)]


def test_a_window_that_begins_in_the_middle_of_a_prompt_shorter_by_one_token():
    """The last token is computed, and sees one token more than the next one will."""
    s, r, _ = scheduler(windows=(0, BLOCK + 1))
    r = Request("b", 4 * BLOCK)
    s.store.put(r, range(4))
    s.store.put(r, [3], group=1)
    assert s.side.match(r, 0).tokens == 0
    s.store.put(r, [2], group=1)
    r.extend(0)
    s.side.finished(r, ([], []))
    assert s.admit(r) == 4 * BLOCK - 1
    assert [p for p, _, _ in moved(s.step().loads)] == [0, 1, 2, 3, 2, 3]


def test_behind_what_the_engine_has_itself_only_the_rest_is_loaded():
    s, r, _ = scheduler()
    s.store.put(r, range(7))
    s.store.put(r, range(4, 7), group=1)
    s.admit(r, 5 * BLOCK + 2 * ENGINE)
    full, window = (block(s, r, 5, group) for group in (0, 1))
    for _, _, blocks in (full, window):
        blocks[:2] = [NULL_BLOCK] * 2  # other requests use those
    assert moved(s.step().loads) == [full, block(s, r, 6, 0), window, block(s, r, 6, 1)]


def test_slow_storage_leaves_what_every_group_has_in_dram():
    s, r, _ = scheduler()
    s.store.put(r, range(7), tier=1)
    s.store.put(r, range(7), tier=1, group=1)
    s.store.put(r, [5], group=1)
    assert s.side.match(r, 0).tokens == 7 * BLOCK
    s.side.heard(StepResult("here", {}, late=True))
    assert s.side.match(r, 0).tokens == 5 * BLOCK


def test_tokens_are_fast_where_all_that_is_loaded_is():
    s, r, _ = scheduler()
    s.store.put(r, range(7), tier=1)
    s.store.put(r, [5], tier=1, group=1)
    s.store.put(r, [6], tier=2, group=1)
    s.admit(r)
    assert s.side.tiers_of(r, 7 * BLOCK) == (6 * BLOCK, BLOCK)


def test_what_failed_is_not_tried_again():
    s, r, _ = scheduler()
    for group in (0, 1):
        s.store.put(r, range(7), group=group)
    assert s.admit(r) == 7 * BLOCK
    s.side.heard(StepResult("here", {"a": 5}))
    assert s.admit(r) == 5 * BLOCK


# ---- saves ----

def test_every_group_saves_what_a_step_has_filled():
    s, r, _ = scheduler()
    s.admit(r)
    assert moved(s.step(new=[(r, 0, 300)]).saves) == [block(s, r, p, g) for g in (0, 1) for p in (0, 1)]
    # In the window of the next token are all blocks that this step fills.
    assert moved(s.step(running=[(r, 300, 700)]).saves) == [block(s, r, p, g) for g in (0, 1) for p in range(2, 7)]


def test_what_full_attention_has_is_announced():
    """Who sends prompts to where they begin needs to know of each block once."""
    s, r, _ = scheduler(windows=(WINDOW, 0))
    r.all_token_ids, r.lora_request = list(range(1000)), None
    s.side.watch("STORAGE")
    s.admit(r)
    s.step(new=[(r, 0, 300)])
    for group in (0, 1):
        s.store.put(r, range(2), group=group)
    s.store.peek, s.store.removed = s.store.lookup, lambda: (b"", 0)
    assert [e.token_ids for e in s.side.events.take()] == [list(range(BLOCK)), list(range(BLOCK, 2 * BLOCK))]


def test_what_the_store_has_is_not_saved_again():
    s, r, _ = scheduler()
    s.store.put(r, range(6))
    s.store.put(r, [2, 3, 5], group=1)
    assert s.admit(r) == 4 * BLOCK
    assert moved(s.step(new=[(r, 4 * BLOCK, 488)]).saves) == [
        block(s, r, 6, 0), *(block(s, r, p, 1) for p in (4, 5, 6))]


def test_what_has_left_a_window_is_not_saved():
    """The engine has these tokens itself, in its own prefix cache, but of the window its end only; its blocks
    of 32 are held as long as one token of them is in the window."""
    s, r, _ = scheduler()
    s.admit(r, 6 * BLOCK)
    assert moved(s.step(new=[(r, 6 * BLOCK, 232)]).saves) == [
        *(block(s, r, p, 0) for p in range(7)), *(block(s, r, p, 1) for p in (4, 5, 6))]


def test_a_block_longer_than_the_window_is_saved_if_all_of_it_is_still_there():
    s, r, _ = scheduler(windows=(ENGINE,))
    s.admit(r)
    assert [p for p, _, _ in moved(s.step(new=[(r, 0, BLOCK + 70)]).saves)] == [0]
    assert [p for p, _, _ in moved(s.step(running=[(r, BLOCK + 70, 2 * BLOCK)]).saves)] == [2]


def test_memory_is_held_while_a_window_is_saved():
    s, r, pool = scheduler()
    s.admit(r)
    first = s.step(new=[(r, 0, 300)])
    held = {b for p in (0, 1) for b in block(s, r, p, 1)[2]}
    assert pool.pinned() == held
    second = s.step(running=[(r, 300, 300)])
    more = {b for p in (2, 3) for b in block(s, r, p, 1)[2]}
    assert pool.pinned() == held | more
    s.side.heard(StepResult("here", {}, released=first.seq - 1))
    assert pool.pinned() == held | more
    s.side.heard(StepResult("here", {}, released=first.seq))
    assert pool.pinned() == more
    s.side.heard(StepResult("here", {}, released=second.seq))
    assert pool.pinned() == set()


def test_the_engine_waits_for_saves_only_if_they_hold_what_nobody_else_does():
    s, r, pool = scheduler()
    assert not s.side.frees()
    s.admit(r)
    step = s.step(new=[(r, 0, 300)])
    assert not s.side.frees()
    pool.free_blocks([pool.blocks[b] for b in block(s, r, 0, 1)[2]])  # it has left the window
    assert s.side.frees()
    s.side.heard(StepResult("here", {}, released=step.seq))
    assert not s.side.frees()


# ---- the worker ----

def worker(**options) -> Worker:
    w = Worker(asynchronous=True, **options)
    w.side._geo = replace(w.side._geo, windows=(0, WINDOW))
    return w


def test_a_failed_load_is_reported_by_request():
    """Which engine blocks those are says nothing to vLLM, for groups share their numbers."""
    w = worker()
    w.store.next = [FakeTask(released=True, failed=[4]), FakeTask(released=True)]
    load = transfer("a", 2, 3)
    load.positions.extend([3, 4])
    load.keys += load.keys[16:]
    load.blocks.extend(load.blocks[RATIO:])
    _, received, bad, result = w.step(loads=[load, transfer("b", 0, 1)])
    assert received == {"a", "b"} and bad == set() and result.failed == {"a": 4}
    assert w.side.failed_requests() == {"a"} and w.side.failed_requests() == set()


def test_who_does_not_ask_which_requests_failed_is_stopped():
    """A wrapper of the connector that knows the older hook only would have the engine compute on nothing."""
    from ucm.integration.vllm.ucm_connector import UCMConnector

    connector = object.__new__(UCMConnector)
    for stopped in (False, True):
        w = worker()
        w.store.next = [FakeTask(released=True, failed=[0])]
        w.side.begin(Step(1, -1, [transfer("a", 0, 1)]))
        w.side.load()
        connector._worker = w.side
        if stopped:
            with pytest.raises(RuntimeError, match="must pass on get_transfer_results"):
                connector.get_finished(set())
        else:
            results = connector.get_transfer_results(set())
            assert results.failed_recving == results.finished_recving == {"a"}


def test_windows_do_not_make_a_load_worth_more_time():
    w = worker()
    load = transfer("a", 2, 4)
    load.positions.extend([4, 5])
    load.keys += load.keys[32:]
    load.blocks.extend(load.blocks[2 * RATIO:])
    w.step(loads=[load], patience_ms=1000.0)
    assert w.store.timeouts == [4000]


def test_an_engine_that_waits_for_saves_sleeps():
    """vLLM has nothing else to compute when the blocks it wants are held."""
    w = worker()
    w.step(saves=[transfer("a", 0, 1)])
    w.step(idle=True)
    assert w.store.dumps[0][3].waits == 1


def test_a_load_that_failed_twice_is_not_tried_again():
    """Each costs all that was loaded before."""
    s, r, _ = scheduler()
    for group in (0, 1):
        s.store.put(r, range(7), group=group)
    hits = []
    for position in (5, 3):
        hits.append(s.admit(r))
        s.side.heard(StepResult(geometry().namespace, {"a": position}))
    assert hits + [s.admit(r)] == [7 * BLOCK, 5 * BLOCK, 0]


def test_the_scheduler_hears_up_to_where_saves_have_let_go():
    w = worker()
    assert w.step()[3].released == 1
    assert w.step(saves=[transfer("a", 0, 1)])[3].released == 1
    assert w.step(saves=[transfer("a", 1, 1)])[3].released == 1
    w.store.dumps[1][3].released = True
    assert w.step()[3].released == 1  # the first may still be reading
    w.store.dumps[0][3].released = True
    assert w.step()[3].released == 5


def test_the_slowest_worker_counts():
    one, other = StepResult("here", {}, released=7), StepResult("here", {}, released=5)
    assert one.aggregate(other).released == other.aggregate(one).released == 5


def test_a_save_that_is_handed_over_after_the_report_is_not_released():
    """The order of vLLM with a draft model."""
    w = worker()
    w.side.begin(Step(1, -1, [], [transfer("a", 0, 1)]))
    w.side.load()
    w.side.transfers_done()
    assert w.side.result().released < 1
    w.side.save()
    assert w.step()[3].released < 1


# ---- what both must agree on ----

def several(*kinds: str, **more):
    return derived(kind=kinds, more={"SlidingWindowSpec": {"sliding_window": WINDOW}, **more})


def test_groups_are_laid_over_each_other():
    g = several("SlidingWindowSpec", "FullAttentionSpec", "SlidingWindowSpec")
    assert g.windows == (WINDOW, 0, WINDOW) and not g.plain and derived().plain
    assert g.block_size == derived().block_size == 2 * g.shard_size
    assert len(g.layers) == 6
    namespaces = {several(*kinds).namespace for kinds in (
        ["SlidingWindowSpec"], ["FullAttentionSpec"], ["SlidingWindowSpec", "FullAttentionSpec"],
        ["FullAttentionSpec", "SlidingWindowSpec"])}
    assert len(namespaces) == 4
    other = several("FullAttentionSpec", "SlidingWindowSpec", SlidingWindowSpec={"sliding_window": 2 * WINDOW})
    assert other.namespace not in namespaces


def test_a_window_is_as_long_as_the_engine_keeps_it():
    """For drafts of several modules vLLM keeps some tokens more, and would take what was not loaded for right."""
    pytest.importorskip("vllm.v1.kv_cache_interface")
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    if not hasattr(SlidingWindowSpec, "extra_retained_tokens"):
        pytest.skip("this vLLM keeps no more than the window")
    more = {"SlidingWindowSpec": {"sliding_window": WINDOW, "extra_retained_tokens": 2}}
    assert derived(kind=["FullAttentionSpec", "SlidingWindowSpec"], more=more).windows == (0, WINDOW + 2)


def test_speculation_in_a_pipeline_is_refused():
    from ucm.integration.vllm.geometry import Unsupported

    guesses = SimpleNamespace(method="ngram")
    assert derived(speculative=guesses).plain
    with pytest.raises(Unsupported, match="pipeline of several stages"):
        derived(speculative=guesses, pipeline_parallel_size=2)


def test_hashes_may_be_of_less_than_an_engine_block():
    g = replace(geometry(), hash_tokens=ENGINE // 2)
    assert g.hashes == 2 * RATIO and geometry().hashes == RATIO


def test_groups_of_other_shapes_are_refused():
    from ucm.integration.vllm.geometry import Unsupported

    with pytest.raises(Unsupported, match="all have the same KV cache shape"):
        several("FullAttentionSpec", "SlidingWindowSpec", FullAttentionSpec={"head_size": 128})


@pytest.mark.parametrize("kinds", [["SlidingWindowSpec"], ["FullAttentionSpec", "FullAttentionSpec"]])
def test_versions_that_cannot_report_by_request_are_refused(kinds, monkeypatch):
    from ucm.integration.vllm import compat
    from ucm.integration.vllm.geometry import Unsupported

    monkeypatch.setattr(compat, "FAILS_BY_REQUEST", False)
    assert derived().plain
    with pytest.raises(Unsupported, match="from vLLM 0.30 on: .* --disable-hybrid-kv-cache-manager"):
        several(*kinds)


def test_tensors_that_are_not_laid_over_each_other_are_refused():
    from ucm.integration.vllm.geometry import Unsupported

    g = replace(geometry(2), layers=("0", "1", "2"), windows=(0, WINDOW))
    w = worker(layers=2)
    w.side._geo = g
    tensors = [torch.zeros(1000, 4096 // RATIO, dtype=torch.uint8) for _ in range(3)]
    w.side.register({"0": tensors[0], "1": tensors[1], "2": tensors[0]})
    with pytest.raises(Unsupported, match="hold 3 layers .* say 2"):
        w.side.register(dict(zip("012", tensors)))
