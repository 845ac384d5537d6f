# SPDX-License-Identifier: Apache-2.0
"""Options of the connector that are more than a number in the policy (test_bookkeeping.py): use_lite,
enable_record_traces."""

from __future__ import annotations

import logging
import re
import time

import pytest
from models import prompt
from support import BLOCK, geometry, hits, tokens
from test_bookkeeping import Request, Scheduler
from ucm.integration.vllm.messages import StepResult

RATES = re.compile(r"req external hit rate: ([\d.]+), total external hit rate: ([\d.]+)")


class LiteScheduler(Scheduler):
    def __init__(self, keys: int = 1000):
        import ucm
        from ucm.integration.vllm.lite import LiteSide
        from ucm.integration.vllm.scheduler import Policy

        g = geometry()
        store = ucm.Store({"store_pipeline": "Fake", "buffer_number": keys, "block_size": g.block_size,
                           "shard_size": g.shard_size})
        self.side = LiteSide(g, store, Policy(loads=True, saves=True, asynchronous=False))
        self.groups, self.tables, self.free = 1, {}, 1


@pytest.fixture
def lite():
    made = []

    def make(**options):
        made.append(LiteScheduler(**options))
        return made[-1]

    yield make
    for s in made:
        s.side.close()


def test_counted_hits_are_not_loaded(lite, caplog):
    caplog.set_level(logging.INFO, "vllm")
    s, first, again = lite(), Request("a", 1000), Request("a", 1100)
    again.request_id = "again"
    for r, tokens in ((first, 1000), (again, 1100)):
        assert s.admit(r) == 0
        step = s.step(new=[(r, 0, tokens)])
        assert (step.loads, step.saves) == ([], [])
        assert s.finish(r) is False and s.step().held == frozenset()
    assert RATES.findall(caplog.text) == [("0.000", "0.000"), ("0.875", "0.467")]


def test_stages_of_a_pipeline_have_one_memory(lite, caplog):
    caplog.set_level(logging.INFO, "vllm")
    s = lite()
    s.side.add_stage(1, "there", lambda: pytest.fail("a memory of its own would know nothing"))
    for name in ("a", "again"):
        r = Request("a", 1000)
        r.request_id = name
        s.admit(r)
        s.step(new=[(r, 0, 1000)])
        s.finish(r)
    assert [rate for rate, _ in RATES.findall(caplog.text)] == ["0.000", "1.000"]


def test_a_request_is_counted_once(lite, caplog):
    caplog.set_level(logging.INFO, "vllm")
    s, r = lite(), Request("a", 1000)
    s.admit(r)
    s.step(new=[(r, 0, 1000)])
    s.step(preempted=[r])
    assert s.side.match(r, 0).external == 7
    assert RATES.findall(caplog.text) == [("0.000", "0.000")]


def test_nobodys_memory_is_held(lite):
    """Not even of what waits for another connector's load."""
    s, r = lite(), Request("a", 1000)
    s.admit(r)
    step = s.step(new=[(r, 3 * BLOCK, 300)])
    assert s.finish(r) is False
    s.side.heard(StepResult("here", {}, settled=step.seq))
    assert s.step().held == frozenset()


def test_only_so_many_keys_are_remembered(lite):
    s, first, other = lite(keys=7), Request("a", 1000), Request("b", BLOCK)
    for r in (first, other):
        s.admit(r)
        s.step(new=[(r, 0, r.num_tokens)])
    again = Request("a", 1000)
    again.request_id = "again"
    assert s.side.match(again, 0).external == 0  # its first block had to go


def test_use_lite(deploy, reference):
    """A real engine: all is computed, nothing is stored, and the log says what would have been hits."""
    p = prompt(2000, 1)
    d = deploy(use_lite=True)
    with d.life() as life:
        for _ in range(2):
            assert tokens(life.call("ask", [p])) == reference([p])
        assert hits(life) == [(15, 0, 0), (15, 0, 15)]
        assert RATES.findall(life.log.read_text()) == [("0.000", "0.000"), ("1.000", "0.500")]
        assert life.call("metrics")["vllm:external_prefix_cache_hits"] == 0
    assert d.segments() == []


def test_enable_record_traces(deploy, tmp_path):
    """What a real engine was asked, in bench/replay's words and in Mooncake's."""
    from ucm.traces import convert, read

    shared = prompt(4 * BLOCK, 2)
    d = deploy(enable_record_traces=True, record_traces_dir=str(tmp_path / "traces"))
    before = time.time()
    with d.life() as life:
        for p in (shared + prompt(50, 3), shared + prompt(60, 4)):
            life.call("ask", [p], 5)
    requests = read([str(tmp_path / "traces")])
    assert [(r["input_length"], r["output_length"]) for r in requests] == [(562, 5), (572, 5)]
    assert before * 1000 < requests[0]["timestamp"] < requests[1]["timestamp"] < time.time() * 1000
    assert [r["hash_ids"] for r in convert(requests, 512)] == [[0, 1], [0, 2]]
