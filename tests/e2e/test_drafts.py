# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding in a real vLLM: a draft model's layers are part of the blocks, guesses are not."""

from __future__ import annotations

import pytest
from models import prompt
from support import BLOCK, hits, tokens

PROMPTS = [prompt(700, 1), prompt(3 * BLOCK, 2)]
FULL = [len(p) // BLOCK for p in PROMPTS]


def ask(life, prompts: list[list[int]], count: int = 24) -> list[list[int]]:
    return [tokens(life.call("ask", [p], count))[0] for p in prompts]


@pytest.fixture(autouse=True)
def served():
    from ucm.integration.vllm.compat import FAILS_BY_REQUEST

    if not FAILS_BY_REQUEST:
        pytest.skip("not with this vLLM")


@pytest.fixture
def speculating(model, eagle):
    """method -> vLLM's option"""
    return lambda method: {"method": method, "num_speculative_tokens": 3, **{
        "draft_model": {"model": str(model("llama-tiny", 8))}, "eagle": {"model": str(eagle)},
        "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1}}[method]}


@pytest.mark.row("speculative decoding")
@pytest.mark.parametrize("method", ["draft_model", "eagle", "ngram"])
def test_restart(deploy, reference, speculating, method):
    expected = reference(PROMPTS, tokens=24)
    d = deploy()
    for found in ([0, 0], FULL):
        with d.life(speculative_config=speculating(method), max_num_batched_tokens=512, max_num_seqs=8) as life:
            assert ask(life, PROMPTS) == expected
            assert life.call("metrics")["vllm:spec_decode_num_draft_tokens"] > 0
            assert [external for _, _, external in hits(life)] == found


@pytest.mark.row("speculative decoding, draft of a hit")
def test_a_draft_model_guesses_as_well_after_a_hit(deploy, reference, speculating, model):
    """The model drafts for itself, so each guess is right if the blocks of the draft's layers are."""
    itself = {**speculating("draft_model"), "model": str(model("llama-tiny"))}
    expected, accepted = reference(PROMPTS, tokens=24), []
    d = deploy()
    for _ in range(2):
        with d.life(speculative_config=itself) as life:
            assert ask(life, PROMPTS) == expected
            m = life.call("metrics")
            accepted.append(m["vllm:spec_decode_num_accepted_tokens"])
            assert accepted[-1] > 0.9 * m["vllm:spec_decode_num_draft_tokens"]
    assert accepted[0] == accepted[1] and [external for _, _, external in hits(life)] == FULL


@pytest.mark.row("speculative decoding, another draft model")
def test_blocks_with_one_draft_model_are_no_blocks_with_another(deploy, reference, speculating, model):
    expected = reference(PROMPTS, tokens=24)
    d = deploy()
    other = {**speculating("draft_model"), "model": str(model("llama-tiny", 9))}
    for option in (speculating("draft_model"), other, None):
        with d.life(**{"speculative_config": option} if option else {}) as life:
            assert ask(life, PROMPTS) == expected
            assert [external for _, _, external in hits(life)] == [0, 0]


def test_what_drafts_otherwise_is_refused():
    from types import SimpleNamespace

    from test_bookkeeping import derived
    from ucm.integration.vllm.geometry import Unsupported

    assert derived(speculative=SimpleNamespace(method="suffix")).namespace == derived().namespace
    with pytest.raises(Unsupported, match="this engine's is dflash"):
        derived(speculative=SimpleNamespace(method="dflash"))
