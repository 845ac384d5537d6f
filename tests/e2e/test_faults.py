# SPDX-License-Identifier: Apache-2.0
"""A real vLLM whose storage is slow, hangs, or is away; requests that are aborted meanwhile."""

from __future__ import annotations

import pytest
from models import prompt
from support import BLOCK, MODES, hits, tokens

PROMPTS = [prompt(5 * BLOCK + 60, 1), prompt(4 * BLOCK, 2)]
FULL = [len(p) // BLOCK for p in PROMPTS]
STORE = {"posix_io_engine": "psync", "posix_data_trans_concurrency": 1}


@pytest.mark.row("storage slower than computing")
@pytest.mark.parametrize("mode", MODES)
def test_a_load_slower_than_computing_is_given_up(deploy, reference, weather, mode):
    d = deploy(STORE, load_timeout_ms=300, **MODES[mode])
    with d.life() as life:
        life.call("ask", PROMPTS)
    with d.life(environment=weather.environment) as life:
        weather.set(reads=200)
        assert tokens(life.call("ask", PROMPTS[:1])) == reference(PROMPTS[:1])
        assert "only what is in DRAM is loaded" in life.log.read_text()
        assert tokens(life.call("ask", PROMPTS[1:])) == reference(PROMPTS[1:])
        assert hits(life, lost=True)[-1][2] == 0
        life.call("save")  # what was computed takes the places of what is still being read
        assert tokens(life.call("ask", PROMPTS[:1])) == reference(PROMPTS[:1])
        assert hits(life, lost=True)[-1][2] == FULL[0]  # from DRAM


@pytest.mark.row("storage hangs in mid-load")
@pytest.mark.parametrize("mode", MODES)
def test_storage_that_hangs_while_blocks_are_loaded(deploy, reference, weather, mode):
    d = deploy({**STORE, "posix_stall_ms": 300}, load_timeout_ms=300, **MODES[mode])
    with d.life() as life:
        life.call("ask", PROMPTS[:1])
    with d.life(environment=weather.environment) as life:
        weather.set(reads=weather.HANGS)
        for p in PROMPTS:
            assert tokens(life.call("ask", [p])) == reference([p])
        weather.set()
        life.call("save")
    with d.life() as life:
        assert tokens([life.call("ask", [p])[0] for p in PROMPTS]) == reference(PROMPTS)
        assert hits(life)[0][2] == FULL[0]


@pytest.mark.row("storage hangs in mid-save")
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_a_write(deploy, reference, weather, mode):
    d = deploy(STORE, **MODES[mode])
    with d.life(environment=weather.environment) as life:
        weather.set(writes=weather.HANGS)
        for p in PROMPTS:
            assert tokens(life.call("ask", [p])) == reference([p])
        assert tokens(life.call("ask", PROMPTS[:1])) == reference(PROMPTS[:1])
        assert hits(life)[-1][2] == FULL[0]  # from DRAM
        weather.set()
        life.call("save")
    with d.life() as life:
        assert tokens([life.call("ask", [p])[0] for p in PROMPTS]) == reference(PROMPTS)
        assert [external for _, _, external in hits(life)] == FULL


@pytest.mark.row("storage away at the start")
def test_storage_that_is_away_at_the_start(deploy, reference, weather):
    d = deploy({**STORE, "posix_stall_ms": 300})
    weather.set(mkdirs=weather.HANGS)
    with d.life(environment=weather.environment) as life:
        assert "cannot be used now, and is tried again" in life.log.read_text()
        assert tokens(life.call("ask", PROMPTS[:1])) == reference(PROMPTS[:1])
        weather.set()
        seed = 100
        while not d.segments():
            life.call("ask", [prompt(BLOCK, seed)], 1)
            seed += 1
            assert seed < 1000
    with d.life() as life:
        life.call("ask", [prompt(BLOCK, seed - 1)], 1)
        assert hits(life) == [(1, 0, 1)]


@pytest.mark.row("aborted while it is loaded aside")
def test_who_is_aborted_keeps_its_memory_until_the_load_has_let_go(deploy, reference, weather):
    """Reads go straight into the engine's memory, of which there is too little for both requests."""
    second = prompt(7 * BLOCK + 20, 3)
    d = deploy({**STORE, "store_pipeline": "Posix"}, **MODES["async"])
    with d.life() as life:
        life.call("ask", PROMPTS[:1])
    with d.life(environment=weather.environment, num_gpu_blocks_override=12, max_model_len=1152) as life:
        weather.set(reads=weather.HANGS)
        life.call("begin", "first", PROMPTS[0])
        life.call("step", 3)
        life.call("abort", "first")
        life.call("begin", "second", second)
        life.call("step", 3)
        weather.set()
        assert life.call("finish") == {"second": reference([second])[0]}


@pytest.mark.row("aborted while it is saved")
@pytest.mark.parametrize("mode", MODES)
def test_who_is_aborted_keeps_its_memory_until_the_save_has_let_go(deploy, reference, weather, mode):
    second = prompt(7 * BLOCK + 20, 3)
    d = deploy({**STORE, "store_pipeline": "Posix"}, **MODES[mode])
    with d.life(environment=weather.environment, num_gpu_blocks_override=12, max_model_len=1152) as life:
        weather.set(writes=weather.HANGS)
        life.call("begin", "first", PROMPTS[0], 100)
        life.call("step", 3)
        life.call("abort", "first")
        life.call("begin", "second", second)
        life.call("step", 3)
        weather.set()
        assert life.call("finish") == {"second": reference([second])[0]}
        life.call("save")
    with d.life() as life:
        assert tokens(life.call("ask", PROMPTS[:1])) == reference(PROMPTS[:1])
        assert hits(life) == [(FULL[0], 0, FULL[0])]
