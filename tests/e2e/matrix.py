# SPDX-License-Identifier: Apache-2.0
"""What `make test-vllm` runs beside the other tests: every way in which an engine gets its blocks, for each kind
of model, in both modes, computed eagerly and compiled.  Ends with a table.  To add a kind of model or engine,
add a line to MODELS or FORMS; to add a case of its own, a test with @pytest.mark.row (or the fixture `row`).
"""

from __future__ import annotations

import pytest
from engine import UCM
from models import prompt
from server import Server, complete
from support import BLOCK, MODES, hits, tokens

WINDOWS = ["gemma2-tiny", "gemma3-tiny"]
MODELS = ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mla-tiny", *WINDOWS]
FORMS: dict[str, dict] = {  # options of vLLM, and its environment
    "eager": {},
    "compiled": {"enforce_eager": False, "environment": {"VLLM_CPU_CI_ENV": "1"}},  # piecewise, but no C++ compiler
}
PROMPTS = [prompt(700, 1), prompt(3 * BLOCK, 2)]
FULL = [len(p) // BLOCK for p in PROMPTS]
PARTIAL = [PROMPTS[0][:300] + prompt(200, 3)]  # shares two blocks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MODELS)
def test_matrix(deploy, row, kind, mode, form):
    d, r = deploy(model_name=kind, **MODES[mode]), row(f"{kind} {mode} {form}", kind, **FORMS[form])
    with d.life(**FORMS[form]) as life:
        r.ask("cold", life, PROMPTS, [0, 0])
    with d.life(**FORMS[form]) as life:
        r.ask("restart", life, PROMPTS, FULL, "disk")
        # What a window needs at the end of a part was not needed at the end of the whole: it is on disk still.
        r.ask("partial", life, PARTIAL, [2], "" if kind in WINDOWS else "host")
        r.ask("DRAM", life, PROMPTS, FULL, "host")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama-tiny", "mla-tiny", "gemma2-tiny"])
def test_bfloat16(deploy, row, zygote, model, kind, mode, work):
    """What is computed after a hit is what vLLM computes after a hit in its own prefix cache: in this precision
    not always what it computes in one go."""
    bf16, d, r = {"dtype": "bfloat16"}, deploy(model_name=kind, **MODES[mode]), row(f"bfloat16 {kind} {mode}")

    def each(life) -> list[list[int]]:  # alone: who shares a step with others computes in other shapes
        return [tokens(life.call("ask", [p], 24))[0] for p in PROMPTS]

    with zygote.life(work / f"bf16-{kind}-{mode}.log", "Engine", model(kind), enable_prefix_caching=True, **bf16) as own:
        cold, hit = each(own), each(own)
    with d.life(**bf16) as life:
        r.note("cold", each(life) == cold)
    with d.life(**bf16) as life:
        r.note("restart", each(life) == hit and [h[2] for h in hits(life)] == FULL)
        r.note("DRAM", each(life) == hit)


@pytest.mark.parametrize("mode", MODES)
def test_cache_salt(deploy, row, mode):
    """Who gives another salt finds nothing; who gives the same finds all."""
    d, r = deploy(**MODES[mode]), row(f"cache_salt {mode}")
    expected = r.reference(PROMPTS[:1])
    with d.life() as life:
        assert tokens(life.call("ask", PROMPTS[:1], 8, "one")) == expected
    with d.life() as life:
        for column, salt, blocks in (("other", "two", 0), ("none", None, 0), ("same", "one", FULL[0])):
            assert tokens(life.call("ask", PROMPTS[:1], 8, salt)) == expected
            r.note(column, hits(life)[-1][2] == blocks)


@pytest.mark.parametrize("mode", MODES)
def test_lora(deploy, row, zygote, model, adapter, mode, work):
    """Blocks of one adapter are no other's, and not the model's own."""
    d, r, p, options = deploy(**MODES[mode]), row(f"LoRA {mode}"), PROMPTS[:1], {"enable_lora": True, "max_lora_rank": 8}
    with zygote.life(work / f"lora-{mode}.log", "Engine", model("llama-tiny"), **options) as plain:
        expected = {lora: tokens(plain.call("ask", p, 8, None, lora)) for lora in (adapter("a"), adapter("b"), None)}
    assert len({str(e) for e in expected.values()}) == 3
    with d.life(**options) as life:
        assert tokens(life.call("ask", p, 8, None, adapter("a"))) == expected[adapter("a")]
    with d.life(**options) as life:
        for column, lora, blocks in (("other", adapter("b"), 0), ("none", None, 0), ("same", adapter("a"), FULL[0])):
            same = tokens(life.call("ask", p, 8, None, lora)) == expected[lora]
            r.note(column, same and hits(life)[-1][2] == blocks)


def test_fp8_kv_cache(deploy, row):
    """Blocks of one precision are no other's."""
    fp8 = {"kv_cache_dtype": "fp8"}
    d, r = deploy(), row("fp8 KV cache", **fp8)
    with d.life(**fp8) as life:
        r.ask("cold", life, PROMPTS, [0, 0])
    with d.life(**fp8) as life:
        r.ask("restart", life, PROMPTS, FULL, "disk")
    with d.life() as life:
        life.call("ask", PROMPTS)
        r.note("other", [external for _, _, external in hits(life)] == [0, 0])


def test_loads_of_both_kinds_in_one_batch(deploy, row, tmp_path):
    """Two stores beside each other in one engine: hits of the first stream into the step, those of the second
    are loaded aside, and some prompts are computed, all in the same steps."""
    first, second = deploy(**MODES["layerwise"]), deploy(**MODES["async"], model_id=f"second {tmp_path}")
    r = row("MultiConnector, layerwise beside async")
    prompts = [prompt(600, 80 + i) for i in range(9)]
    expected = r.reference(prompts)
    for d, some in ((first, prompts[:3]), (second, prompts[3:6])):
        with d.life() as life:
            life.call("ask", some)
    first.config = {"connectors": [{**UCM, "kv_role": role, "kv_connector_extra_config": config}
                                   for role, config in (("kv_both", first.config), ("kv_consumer", second.config))]}
    with first.life() as life:
        mixed = [p for three in zip(prompts[:3], prompts[3:6], prompts[6:]) for p in three]
        answers = dict(zip(map(str, mixed), tokens(life.call("ask", mixed))))
        loaded = life.call("metrics")["vllm:external_prefix_cache_hits"]
        r.note("all", [answers[str(p)] for p in prompts] == expected and loaded == 6 * (600 // BLOCK) * BLOCK)


RANKED = r"EngineCore_DP(\d) .* hit hbm: 0, hit external: (\d+)"  # which rank's engine says it


@pytest.mark.row("vllm serve, DP2")
def test_data_parallel(model, reference, tmp_path):
    """Each rank is an engine of its own, with the one store: what one has computed the other loads, and after a
    restart each loads what both had."""
    (tmp_path / "store").mkdir()
    transfer = {**UCM, "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {
        "storage_backends": str(tmp_path / "store"), "cache_buffer_capacity_gb": 0.25, "posix_segment_mb": 16,
        "model_id": str(tmp_path)}}
    prompts = [prompt(7 * BLOCK + 50, 1), prompt(5 * BLOCK + 50, 2)]
    expected = reference(prompts)
    lives = {"first": [(0, 0, 0), (1, 1, 0), (1, 0, 7), (0, 1, 5)],
             "restarted": [(1, 0, 7), (0, 1, 5), (0, 0, 7), (1, 1, 5)]}
    for life, asked in lives.items():  # of each request: the rank that is asked, the prompt, the blocks that it finds
        with Server(model(), tmp_path / f"{life}.log", transfer, "--data-parallel-size", 2, "--api-server-count", 1,
                    "--skip-tokenizer-init", "--max-model-len", "8192") as server:
            server.wait()
            for rank, which, _ in asked:
                assert complete(server.port, server.model, prompts[which], rank=rank).tokens == expected[which]
            assert [(int(rank), int(hit)) for rank, hit in server.lines(RANKED)] == [(r, hit) for r, _, hit in asked]
            server.stop()
