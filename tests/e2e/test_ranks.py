# SPDX-License-Identifier: Apache-2.0
"""A real vLLM of several workers: a hit is what all of them can load, and none goes its own way."""

from __future__ import annotations

import shutil

import pytest
import ucm
from models import prompt
from support import BLOCK, MODES, flip_bytes, hits, tokens
from test_stats import YAML, samples

PROMPTS = [prompt(1000, 1), prompt(5 * BLOCK, 2), prompt(512, 3) + prompt(200, 4)]
FULL = [len(p) // BLOCK for p in PROMPTS]
TP2 = {"tensor_parallel_size": 2}
KINDS = pytest.mark.parametrize("kind, mode", [("llama-tiny", "layerwise"), ("llama-tiny", "async"),
                                               ("gemma2-tiny", "async")])
SMALL = {"kv_cache_memory_bytes": 1 << 26}  # so that there is room for two


def ask(life, prompts=PROMPTS):
    return tokens([life.call("ask", [p])[0] for p in prompts])


@pytest.mark.row("TP2")
@KINDS
def test_tensor_parallel(deploy, reference, kind, mode):
    """Cold, restarted, a part of the prompt; and damage on one rank, of which only the other knows nothing."""
    longer = PROMPTS[2][:512] + prompt(300, 5)
    expected = reference([*PROMPTS, longer], kind)
    d = deploy(model_name=kind, **MODES[mode])
    with d.life(**TP2) as life:
        assert ask(life) == expected[:3]
    assert sorted(lane["rank"] for lane in ucm.inspect(d.storage)) == [0, 1]
    with d.life(**TP2) as life:
        assert ask(life, [*PROMPTS, longer]) == expected
        assert hits(life) == [(n, 0, n) for n in FULL] + [(6, 0, 4)]
    flip_bytes(d.segments(rank=1), every=1 << 20)
    with d.life(**TP2) as life:
        assert tokens(life.call("ask", PROMPTS)) == expected[:3]
        assert "could not be loaded" in life.log.read_text()
    with d.life(**TP2) as life:  # what was lost has been saved again, and nothing wrong beside it
        assert ask(life) == expected[:3]
        assert hits(life) == [(n, 0, n) for n in FULL]


@pytest.mark.row("TP2, one rank's blocks gone")
def test_what_one_rank_has_not_is_a_miss_for_all(deploy, reference):
    expected = reference(PROMPTS[:1])
    d = deploy()
    with d.life(**TP2) as life:
        assert ask(life, PROMPTS[:1]) == expected
    (segment, *_) = d.segments(rank=1)
    shutil.rmtree(segment.parent)
    for found in (0, FULL[0]):
        with d.life(**TP2) as life:
            assert ask(life, PROMPTS[:1]) == expected
            assert hits(life) == [(FULL[0], 0, found)]


@pytest.mark.row("MLA TP2")
def test_latent_attention_is_stored_once(deploy, reference):
    """All ranks hold the same: one writes, each loads what one has read; and any number of them share it."""
    expected = [reference([p], "mla-tiny", **TP2)[0] for p in PROMPTS[:2]]  # sums depend on what is beside them
    d = deploy(model_name="mla-tiny", metrics_config_path=str(YAML))
    with d.life(**TP2) as life:
        assert ask(life, PROMPTS[:2]) == expected
    (lane,) = ucm.inspect(d.storage)
    assert (lane["ranks"], lane["blocks"]) == (1, sum(FULL[:2]))
    with d.life(**TP2) as life:
        assert ask(life, PROMPTS[:2]) == expected
        assert hits(life) == [(n, 0, n) for n in FULL[:2]]
        m = samples(life.call("scrape"))
        assert m["ucm:load_bytes_total"] == 2 * sum(FULL[:2]) * lane["block_size"]
        assert 2 * m["ucm:disk_reads_total"] == m["ucm:load_blocks_total"]  # in both, pieces of blocks
    with d.life() as life:  # sums in another order: its own tokens may differ
        ask(life, PROMPTS[:2])
        assert hits(life) == [(n, 0, n) for n in FULL[:2]]


@pytest.mark.row("PP2, stages of unequal size")
@KINDS
def test_pipeline(deploy, reference, kind, mode):
    """Three layers here, one there (of gemma2 one of full attention and two with a window; and one more of full
    attention); then the one loses blocks."""
    longer = PROMPTS[2][:512] + prompt(300, 5)
    expected = reference([*PROMPTS, longer], kind)
    d = deploy(model_name=kind, **MODES[mode])
    options = {"pipeline_parallel_size": 2, "environment": {"VLLM_PP_LAYER_PARTITION": "3,1"}}
    with d.life(**options) as life:
        assert ask(life) == expected[:3]
    stages = {lane["namespace"]: lane for lane in ucm.inspect(d.storage)}.values()
    small, large = sorted(stages, key=lambda stage: stage["block_size"])
    assert large["block_size"] == (3 if kind == "llama-tiny" else 2) * small["block_size"]
    with d.life(**options) as life:
        assert ask(life, [*PROMPTS, longer]) == expected
        assert hits(life) == [(n, 0, n) for n in FULL] + [(6, 0, 4)]
    flip_bytes([p for p in d.segments() if small["namespace"] in str(p)], every=1 << 20)
    with d.life(**options) as life:
        assert tokens(life.call("ask", PROMPTS)) == expected[:3]
        assert "could not be loaded" in life.log.read_text()
    with d.life(**options) as life:
        assert ask(life) == expected[:3]
        assert hits(life) == [(n, 0, n) for n in FULL]


@pytest.mark.row("two engines at once, kv_both")
def test_engines_side_by_side(deploy, reference):
    """As those of data parallelism are, or prefillers and decoders of which each does both: what one has computed
    the other loads, while both work on several requests."""
    prompts = [prompt(300 + 70 * i, 80 + i) for i in range(8)]
    answers = dict(zip(map(tuple, prompts), reference(prompts)))
    d = deploy()
    with d.life(**SMALL) as one, d.life(**SMALL) as other:
        for mine, yours in ((prompts[:4], prompts[4:]), (prompts[4:], prompts[:4])):
            one.send("ask", mine)
            other.send("ask", yours)
            assert tokens(one.reply() + other.reply()) == [answers[tuple(p)] for p in mine + yours]
            one.call("save")
            other.call("save")
        assert sorted(hits(one)[4:] + hits(other)[4:]) == [(len(p) // BLOCK, 0, len(p) // BLOCK) for p in prompts]
