# SPDX-License-Identifier: Apache-2.0
"""A real vLLM with ucm: what it stores is found by the next process, and never changes a token."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from engine import UCM
from models import prompt
from support import BLOCK, MODES, flip_bytes, hits, tokens

# A plain one; a whole number of blocks; two that share 512 tokens; less than a block.
PROMPTS = [prompt(2000, 1), prompt(5 * BLOCK, 2), prompt(512, 3) + prompt(500, 4), prompt(512, 3) + prompt(300, 5),
           prompt(100, 6)]
FULL = [len(p) // BLOCK for p in PROMPTS]


def loaded_tokens(life) -> int:
    return int(life.call("metrics")["vllm:external_prefix_cache_hits"])


def restart_test(deployment, reference, prompts=PROMPTS, **options):
    """Asks a new engine for the prompts, ends it, asks another: all full blocks are hits, all tokens right."""
    expected = reference(prompts)
    with deployment.life(**options) as life:
        assert tokens([life.call("ask", [p])[0] for p in prompts]) == expected
    with deployment.life(**options) as life:
        answers = [life.call("ask", [p])[0] for p in prompts]
        assert tokens(answers) == expected
        assert hits(life) == [(len(p) // BLOCK, 0, len(p) // BLOCK) for p in prompts]
        # The last token is always computed.
        assert [a["cached"] for a in answers] == [min(len(p) // BLOCK * BLOCK, len(p) - 1) for p in prompts]


@pytest.mark.parametrize("pipeline", ["Cache|Posix", "Posix"])
@pytest.mark.parametrize("mode", MODES)
def test_restart(deploy, reference, pipeline, mode):
    restart_test(deploy({"store_pipeline": pipeline}, **MODES[mode]), reference)


def test_prompts_sharing_a_prefix_share_blocks(deploy, reference):
    d = deploy()
    with d.life() as life:
        for p in PROMPTS[2:4]:
            assert tokens(life.call("ask", [p])) == reference([p])
            life.call("save")
        assert hits(life)[1] == (FULL[3], 0, 4)


def test_many_at_once(deploy, reference):
    prompts = [prompt(300 + 70 * i, 20 + i) for i in range(8)]
    expected = reference(prompts)
    d = deploy(**MODES["async"])
    for _ in range(2):
        with d.life() as life:
            assert tokens(life.call("ask", prompts)) == expected
    assert sorted(hits(life)) == [(len(p) // BLOCK, 0, len(p) // BLOCK) for p in prompts]


@pytest.mark.row("chunked prefill")
@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill(deploy, reference, mode):
    restart_test(deploy(**MODES[mode]), reference, PROMPTS[:3], max_num_batched_tokens=512, max_num_seqs=8)


def test_small_engine_blocks(deploy, reference):
    restart_test(deploy(chunk_tokens=BLOCK), reference, block_size=32)


def test_processes_apart(deploy, reference):
    """Scheduler and worker as `vllm serve` runs them: each way between them and an engine in one process.
    Slow (both import vLLM), so all of it in one life."""
    d = deploy()
    with d.life() as life:
        assert tokens(life.call("ask", [PROMPTS[0]])) == reference([PROMPTS[0]])
    with d.life(environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as life:
        assert tokens([life.call("ask", [p])[0] for p in PROMPTS[:2]]) == reference(PROMPTS[:2])
        assert hits(life) == [(FULL[0], 0, FULL[0]), (FULL[1], 0, 0)]
    with d.life() as life:
        assert tokens(life.call("ask", [PROMPTS[1]])) == reference([PROMPTS[1]])
        assert hits(life) == [(FULL[1], 0, FULL[1])]


@pytest.mark.parametrize("kept", [True, False])
def test_generated_tokens_are_kept(deploy, reference, kept):
    """The next turn of a conversation finds the answer to the last one, if it is to."""
    p = prompt(200, 7)
    d = deploy(save_generated=kept)
    with d.life() as life:
        answer = life.call("ask", [p], 100)[0]["tokens"]
        life.call("save")
        turn = p + answer + prompt(50, 8)
        assert tokens(life.call("ask", [turn])) == reference([turn])
        assert hits(life)[1] == (350 // BLOCK, 0, (299 if kept else 200) // BLOCK)


@pytest.mark.row("preemption")
@pytest.mark.parametrize("mode", MODES)
def test_preemption(deploy, reference, mode):
    """More work than the engine's memory holds: requests are thrown out, come back, and load what they
    had saved."""
    prompts = [prompt(600, 30 + i) for i in range(6)]
    expected = reference(prompts, tokens=100)
    d = deploy(chunk_tokens=BLOCK, **MODES[mode])
    with d.life(block_size=32, num_gpu_blocks_override=100, max_model_len=2048) as life:
        assert tokens(life.call("ask", prompts, 100)) == expected
        assert life.call("metrics")["vllm:num_preemptions"] > 0
        assert loaded_tokens(life) == 0  # vLLM counts only the first admission
        assert sum(external for _, _, external in hits(life)) > 0


@pytest.mark.row("beside vLLM's own prefix cache")
@pytest.mark.parametrize("mode", MODES)
def test_beside_the_engines_own_cache(deploy, reference, mode):
    """Hits of vLLM's prefix cache that end inside one of our blocks: the rest of it is loaded, and the part
    that other requests use is left alone."""
    shared = prompt(5 * BLOCK, 9)
    long = shared + prompt(2 * BLOCK + 10, 10)
    short = shared[:BLOCK + 3 * 32 + 5] + prompt(20, 11)
    options = {"block_size": 32, "enable_prefix_caching": True}
    d = deploy(chunk_tokens=BLOCK, **MODES[mode])
    with d.life(**options) as life:
        assert tokens(life.call("ask", [long])) == reference([long])
    with d.life(**options) as life:
        # Not in our store beyond the first block, so the engine's cache then ends at 7 of its blocks.
        assert tokens(life.call("ask", [short])) == reference([short])
        assert tokens(life.call("ask", [long])) == reference([long])
        assert hits(life)[1] == (7, 1, 6)
        assert loaded_tokens(life) == BLOCK + (7 * BLOCK - 7 * 32)
        assert tokens(life.call("ask", [short])) == reference([short])


def test_reset_prefix_cache(deploy, reference):
    """Empties the engine's own cache; of what is stored only who asks for that finds nothing more, but what it stores
    from then on."""
    p = prompt(1000, 1)
    with deploy().life(enable_prefix_caching=True) as life:
        for reset, found in ((None, (7, 0, 0)), (None, (7, 7, 0)), (False, (7, 0, 7)), (True, (7, 0, 0)), (False, (7, 0, 7))):
            if reset is not None:
                assert life.call("reset", reset)
            assert tokens(life.call("ask", [p])) == reference([p])
            assert hits(life)[-1] == found
            life.call("save")
            life.call("ask", [prompt(20, 2)])  # blocks that were saved are free after a step


def test_latent_attention(deploy, reference):
    prompts = PROMPTS[:2]
    expected = reference(prompts, "mla-tiny")
    d = deploy(model_name="mla-tiny")
    for _ in range(2):
        with d.life() as life:
            assert tokens([life.call("ask", [p])[0] for p in prompts]) == expected
    assert [external for _, _, external in hits(life)] == [len(p) // BLOCK for p in prompts]


def test_roles(deploy, reference):
    p = PROMPTS[0]
    d = deploy()
    with d.life(role="kv_consumer") as life:
        assert tokens(life.call("ask", [p])) == reference([p])
    assert d.segments() == []
    with d.life(role="kv_producer") as life:
        for _ in range(2):
            assert tokens(life.call("ask", [p])) == reference([p])
        assert loaded_tokens(life) == 0
    with d.life(role="kv_consumer") as life:
        assert tokens(life.call("ask", [p])) == reference([p])
        assert hits(life) == [(FULL[0], 0, FULL[0])]


def test_a_consumer_finds_all_when_the_producer_has_answered(deploy, reference):
    """Prefill here, decode there, at the same time and without a pool that both share."""
    prompts = [prompt(6 * BLOCK, 70 + i) for i in range(4)]
    expected = reference(prompts)
    d = deploy({"store_pipeline": "Posix"})
    with d.life(role="kv_producer", max_num_batched_tokens=512) as producer, d.life(role="kv_consumer") as consumer:
        for p, answer in zip(prompts, expected):
            producer.call("ask", [p], 1)
            assert tokens(consumer.call("ask", [p])) == [answer]
        assert hits(consumer) == [(6, 0, 6)] * 4


def test_short_prompts_can_be_left_out(deploy, reference):
    d = deploy(persist_token_threshold=1000)
    for _ in range(2):
        with d.life() as life:
            for p in PROMPTS[:2]:
                assert tokens(life.call("ask", [p])) == reference([p])
    assert [external for _, _, external in hits(life)] == [FULL[0], 0]


def test_other_weights_share_nothing(deploy, reference):
    """Two models that differ in their weights alone, on one directory, neither named by model_id."""
    first = deploy(model_id="")
    p = PROMPTS[0]
    with first.life() as life:
        assert tokens(life.call("ask", [p])) == reference([p])
    second = deploy(seed=8, model_id="")
    second.config = first.config
    with second.life() as life:
        life.call("ask", [p])
        assert hits(life) == [(FULL[0], 0, 0)]
    with first.life() as life:
        assert tokens(life.call("ask", [p])) == reference([p])
        assert hits(life) == [(FULL[0], 0, FULL[0])]


def test_the_documented_configuration_file(deploy, reference, tmp_path):
    """examples/ucm_config_example.yaml with the directory filled in, named as the documents name it; a pool of
    the size that the machine can give takes long to make, so the environment says otherwise."""
    example = (Path(__file__).parents[2] / "examples" / "ucm_config_example.yaml").read_text()
    d = deploy()
    assert "/mnt/test" in example
    path = tmp_path / "ucm.yaml"
    path.write_text(example.replace("/mnt/test", str(d.storage)) + f"model_id: {tmp_path.name}\n")
    d.config = {"UCM_CONFIG_FILE": str(path)}
    restart_test(d, reference, PROMPTS[:1], environment={"UCM_CACHE_BUFFER_CAPACITY_GB": "0.25"})


@pytest.mark.parametrize("options, said", [
    ({"chunk_tokens": 100}, "must be a multiple of the engine's block size"),
    ({"use_layerwize": True}, "use_layerwise"),
])
def test_bad_options_end_the_start(deploy, options, said):
    d = deploy(**options)
    with pytest.raises(RuntimeError) as e:
        d.life()
    assert said in str(e.value)


# ---- bad luck ----

@pytest.mark.row("damaged blocks, policy recompute")
@pytest.mark.parametrize("pipeline, mode", [
    ("Cache|Posix", "layerwise"), ("Cache|Posix", "async"), ("Posix", "layerwise")])
def test_damaged_blocks_are_computed_again(deploy, reference, pipeline, mode):
    prompts = PROMPTS[:2]
    expected = reference(prompts)
    d = deploy({"store_pipeline": pipeline}, **MODES[mode])
    with d.life() as life:
        assert tokens([life.call("ask", [p])[0] for p in prompts]) == expected
    flip_bytes(d.segments(), every=4 << 20)
    with d.life() as life:
        assert tokens([life.call("ask", [p])[0] for p in prompts]) == expected
        assert "could not be loaded" in life.log.read_text()
    with d.life() as life:  # what was lost has been saved again
        assert tokens([life.call("ask", [p])[0] for p in prompts]) == expected
        assert [external for _, _, external in hits(life)] == FULL[:2]


@pytest.mark.row("damaged blocks beside other requests")
@pytest.mark.parametrize("mode", MODES)
def test_damage_beside_other_requests(deploy, reference, mode):
    """Loads fail while other requests are computed in the same steps."""
    prompts = [prompt(700, 40 + i) for i in range(4)]
    fresh = [prompt(700, 50 + i) for i in range(4)]
    both = [p for pair in zip(prompts, fresh) for p in pair]
    expected = reference(both)
    d = deploy(**MODES[mode])
    with d.life() as life:
        life.call("ask", prompts)
    flip_bytes(d.segments(), every=1 << 20)
    with d.life() as life:
        assert tokens(life.call("ask", both)) == expected
        assert "could not be loaded" in life.log.read_text()
    with d.life() as life:
        assert tokens(life.call("ask", both)) == expected
        assert [external for _, _, external in hits(life)] == [5] * len(both)


@pytest.mark.row("damaged blocks of another connector (MultiConnector)")
def test_damage_in_another_connectors_store(deploy, reference, tmp_path):
    """Its load fails in a step in which another request hits, in vLLM's own cache, what it was to bring: that is not
    saved here."""
    first, second = deploy(), deploy(model_id=f"second {tmp_path}")
    loaded = prompt(5 * BLOCK + 50, 90)
    prompts = [loaded, loaded[:5 * BLOCK] + prompt(2 * BLOCK, 91)]
    expected = reference(prompts)
    with second.life() as life:
        life.call("ask", prompts[:1])
    flip_bytes(second.segments(), every=1 << 20)
    alone, first.config = first.config, {"connectors": [
        {**UCM, "kv_role": role, "kv_connector_extra_config": d.config}
        for role, d in (("kv_both", first), ("kv_consumer", second))]}
    with first.life(enable_prefix_caching=True) as life:
        assert tokens(life.call("ask", prompts)) == expected
        assert "could not be loaded" in life.log.read_text()
    first.config = alone
    with first.life() as life:
        assert tokens(life.call("ask", prompts)) == expected
        assert hits(life) == [(5, 0, 5), (7, 0, 7)]


@pytest.mark.row("policy fail")
@pytest.mark.parametrize("mode", MODES)
def test_policy_fail(deploy, reference, mode):
    p = PROMPTS[0]
    d = deploy(**MODES[mode])
    with d.life() as life:
        life.call("ask", [p])
    flip_bytes(d.segments(), every=1 << 20)
    with d.life(policy="fail") as life:
        assert 'Give "kv_load_failure_policy": "recompute"' in life.log.read_text()
        (answer,) = life.call("ask", [p])
        assert (answer["finish"], answer["tokens"]) == ("error", [])
        assert tokens(life.call("ask", [PROMPTS[1]])) == reference([PROMPTS[1]])


def test_storage_removed_while_running(deploy, reference):
    d = deploy()
    with d.life() as life:
        assert tokens(life.call("ask", [PROMPTS[0]])) == reference([PROMPTS[0]])
        shutil.rmtree(d.storage)
        for p in PROMPTS:
            assert tokens(life.call("ask", [p])) == reference([p])


@pytest.mark.parametrize("shared", [True, False])
def test_killed_while_saving(deploy, reference, shared):
    """The engine dies at whatever point it is at when its bytes reach the disk; twice.  What was STORED before is
    there for the next.  What it had not written down its successor has in DRAM, if that is shared, and writes
    down: then nothing is missing in the second life."""
    stored, prompts = prompt(900, 59), [prompt(1500, 60 + i) for i in range(4)]
    expected = reference([stored, *prompts])
    d = deploy({"share_buffer_enable": shared})
    for _ in range(2):
        life = d.life()
        life.call("ask", [stored])
        life.call("save")
        before = d.newest_write()
        life.send("ask", prompts)
        wait_until(lambda: d.newest_write() > before)
        life.kill()
    for _ in range(2):
        with d.life() as life:
            assert tokens(life.call("ask", [stored, *prompts])) == expected
            assert hits(life)[0][2] == 900 // BLOCK
    assert [external for _, _, external in hits(life)] == [900 // BLOCK] + [1500 // BLOCK] * 4


def wait_until(condition, timeout_s: float = 60) -> None:
    """What another process writes below directories that it has yet to make is no event to wait for: so this
    looks again and again, and sleeps in between to leave the processors to the engine."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
