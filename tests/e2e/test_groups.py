# SPDX-License-Identifier: Apache-2.0
"""Models of several KV cache groups in a real vLLM: full attention beside layers that see a window only."""

from __future__ import annotations

import pytest
from models import prompt
from support import BLOCK, hits, tokens
from test_stats import YAML, samples

MODELS = {"gemma2-tiny": (1, 256, 1), "gemma3-tiny": (1, 128, 3)}  # groups without a window, the window, groups with it
SLOT = 4096 + 2 * BLOCK * 4 * 2 * 64 * 4  # of a block of gemma2-tiny: header, layers x tokens x heads x K, V x size
PROMPTS = [prompt(2000, 1), prompt(10 * BLOCK, 2)]
FULL = [len(p) // BLOCK for p in PROMPTS]

@pytest.fixture(autouse=True)
def by_request():
    from ucm.integration.vllm.compat import FAILS_BY_REQUEST

    if not FAILS_BY_REQUEST:
        pytest.skip("this vLLM makes one group of them")


every_model = pytest.mark.parametrize("model_name", MODELS)


def needed(model_name: str, tokens: int) -> int:
    """Blocks to go on after so many tokens."""
    full, window, windows = MODELS[model_name]
    end, first = -(-tokens // BLOCK), max(0, tokens + 1 - window) // BLOCK
    return full * end + windows * (end - first)


def ask(life, prompts: list[list[int]]) -> list[list[int]]:
    return [tokens(life.call("ask", [p]))[0] for p in prompts]


@pytest.mark.row("several KV cache groups")
@every_model
def test_of_a_window_only_what_is_in_it_is_loaded(deploy, reference, model_name):
    expected = reference(PROMPTS, model_name)
    d = deploy(model_name=model_name, metrics_config_path=str(YAML))
    with d.life() as life:
        assert ask(life, PROMPTS) == expected
    with d.life() as life:
        assert ask(life, PROMPTS) == expected
        assert [external for _, _, external in hits(life)] == FULL
        loaded = [FULL[0] * BLOCK, len(PROMPTS[1]) - 1]  # the last token is always computed
        assert samples(life.call("scrape"))["ucm:load_blocks_num_sum"] == sum(needed(model_name, n) for n in loaded)


@pytest.mark.row("several KV cache groups, chunked prefill")
@every_model
def test_windows_that_move_while_a_prompt_is_computed(deploy, reference, model_name):
    """In steps shorter than a window and a block, with memory for the windows only: what leaves one is
    used again at once.  Prompts that share a part hit where it ends."""
    shared = PROMPTS[0][:9 * BLOCK + 40] + prompt(300, 3)
    expected = reference([*PROMPTS, shared], model_name)
    d = deploy(model_name=model_name, chunk_tokens=BLOCK)
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 2, "block_size": 32, "max_model_len": 2048,
               "num_gpu_blocks_override": 130}
    with d.life(**options) as life:
        assert ask(life, PROMPTS) == expected[:2]
    with d.life(**options) as life:
        assert ask(life, [shared, *PROMPTS]) == expected[2:] + expected[:2]
        assert [external for _, _, external in hits(life)] == [9, *FULL]


@pytest.mark.row("several KV cache groups, generated tokens")
@every_model
def test_generated_tokens_are_kept(deploy, reference, model_name):
    p = prompt(400, 7)
    d = deploy(model_name=model_name)
    with d.life() as life:
        answer = life.call("ask", [p], 300)[0]["tokens"]
        turn = p + answer + prompt(50, 8)
    with d.life() as life:
        assert ask(life, [turn]) == reference([turn], model_name)
        assert hits(life) == [(750 // BLOCK, 0, 699 // BLOCK)]


@pytest.mark.row("several KV cache groups, damaged blocks")
@pytest.mark.parametrize("block", [15 + 13, 4])
def test_damage(deploy, reference, block):
    """One block: of a window, and of full attention.  It is computed again, and saved again."""
    p = PROMPTS[:1]
    expected = reference(p, "gemma2-tiny")
    d = deploy(model_name="gemma2-tiny")
    with d.life() as life:
        assert ask(life, p) == expected
    (segment,) = d.segments()
    with open(segment, "r+b") as f:
        f.seek(block * SLOT + SLOT // 2)
        f.write(bytes(64))
    with d.life() as life:
        assert ask(life, p) == expected
        assert "17 of 17 blocks could not be loaded" in life.log.read_text()
        # What is before the bad one is tried again, if a window of it is there.
        assert hits(life, lost=True) == [(15, 0, 15), (15, 0, 13 if block > 15 else 4)]
        life.call("save")
    with d.life() as life:
        assert ask(life, p) == expected
        assert hits(life) == [(15, 0, 15)]


@pytest.mark.row("several KV cache groups, preemption")
def test_preemption(deploy, reference):
    """Three prompts fit (of each 19 + 9 blocks, and 8 more while one is computed), three answers do not."""
    prompts = [prompt(600, 30 + i) for i in range(4)]
    expected = reference(prompts, "gemma2-tiny", tokens=200)
    d = deploy(model_name="gemma2-tiny", chunk_tokens=BLOCK)
    with d.life(block_size=32, num_gpu_blocks_override=98, max_model_len=1024, max_num_batched_tokens=256,
                max_num_seqs=8) as life:
        assert tokens(life.call("ask", prompts, 200)) == expected
        assert life.call("metrics")["vllm:num_preemptions"] > 0
        assert sum(external for _, _, external in hits(life)) > 0


@pytest.mark.row("several KV cache groups, vLLM's own prefix cache")
@every_model
def test_beside_the_engines_own_cache(deploy, reference, model_name):
    shared = prompt(9 * BLOCK, 9)
    long = shared + prompt(5 * BLOCK + 10, 10)
    short = shared[:6 * BLOCK + 3 * 32 + 5] + prompt(20, 11)
    expected = reference([long, short], model_name)
    options = {"block_size": 32, "enable_prefix_caching": True}
    d = deploy(model_name=model_name, chunk_tokens=BLOCK)
    with d.life(**options) as life:
        assert ask(life, [long]) == expected[:1]
    with d.life(**options) as life:
        assert ask(life, [short, long, long]) == [expected[1], expected[0], expected[0]]
        assert hits(life) == [(6, 0, 6), (14, 6, 8), (14, 14, 0)]


@pytest.mark.row("several KV cache groups, slow saves")
def test_what_leaves_a_window_while_it_is_saved(deploy, reference, weather):
    """Written straight from the engine's memory, of which there is little: storage that hangs holds up the
    engine, and never stores what came there later."""
    long = prompt(14 * BLOCK, 1)
    parts = [long[:n * BLOCK + 5] for n in (3, 6, 9, 14)]
    expected = reference(parts, "gemma2-tiny")
    d = deploy({"store_pipeline": "Posix", "posix_io_engine": "psync", "posix_data_trans_concurrency": 1},
               model_name="gemma2-tiny")
    with d.life(environment=weather.environment, num_gpu_blocks_override=26, max_num_batched_tokens=256,
                max_num_seqs=2, max_model_len=2048) as life:
        weather.set(writes=weather.HANGS)
        life.call("begin", "long", long)
        life.call("step", 12)
        weather.set()
        assert life.call("finish") == {"long": expected[-1]}
        assert life.call("metrics")["vllm:num_preemptions"] == 0
    with d.life() as life:
        assert ask(life, parts) == expected
        assert hits(life) == [(n, 0, n) for n in (3, 6, 9, 14)]


def test_without_the_hybrid_manager_all_layers_are_one_group(deploy, reference):
    """What engines are told to do that cannot report a failed load of several groups."""
    expected = reference(PROMPTS[:1], "gemma2-tiny")
    d = deploy(model_name="gemma2-tiny")
    for _ in range(2):
        with d.life(disable_hybrid_kv_cache_manager=True) as life:
            assert ask(life, PROMPTS[:1]) == expected
    assert hits(life) == [(15, 0, 15)]
    with d.life() as life:  # blocks of one form are no blocks of the other
        assert ask(life, PROMPTS[:1]) == expected
        assert hits(life) == [(15, 0, 0)]
