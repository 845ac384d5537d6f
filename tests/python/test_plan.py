# SPDX-License-Identifier: Apache-2.0
"""The model of engines and storage against closed forms and against measured tables; what `ucm plan` answers."""

import json
import random
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ucm import costs, plan
from ucm.simulate import INF, Costs, Engine, Request, Store, System, simulate

PLANNING = Path(__file__).parents[2] / "examples" / "planning"


# ---- closed forms ----

def poisson(rate, n, prompt, seed=1, **kwargs):
    r, at, out = random.Random(seed), 0.0, []
    for _ in range(n):
        at += r.expovariate(rate)
        out.append(Request(at, prompt, **kwargs))
    return out


def test_one_engine_is_an_m_d_1_queue():
    """With steps of one prompt each: waiting is rho s / 2 (1 - rho)."""
    load, s = poisson(7.0, 40000, 1000), 0.1
    engine = Engine(Costs(token_s=s / 1000), batched_tokens=1000)
    result = simulate(load, System(engine, 1))
    waited = statistics.fmean(r.ttft for r in load) - s
    assert waited == pytest.approx(0.7 * s / 2 / 0.3, rel=0.05)
    assert result.prefill_busy == pytest.approx(0.7, rel=0.03)


def test_littles_law():
    load = poisson(5.0, 2000, 500, output=50)
    engine = Engine(Costs(token_s=1e-4, decode_s=0.01, sequence_s=1e-4))
    result = simulate(load, System(engine, 2, store=Store(1e5, node=1e9, write=1e9)))
    events = sorted([(r.sent, 1) for r in load] + [(r.end, -1) for r in load])
    area = inside = last = 0
    for at, step in events:
        area, last, inside = area + inside * (at - last), at, inside + step
    assert inside == 0 and area == pytest.approx(sum(r.end - r.sent for r in load))
    assert result.written == pytest.approx(2000 * 384 * 1e5)  # 3 whole blocks of each prompt
    assert result.read == 0


def test_a_load_takes_its_bytes_over_the_bandwidth():
    store = Store(token_bytes=1e5, read=5e9, latency_s=0.002)
    request = Request(0, 12801, hit=12800)
    engine = Engine(layers=10)
    simulate([request], System(engine, 1, store=store))
    assert request.ttft == pytest.approx(12800 * 1e5 / 5e9 + 0.002)
    two = [Request(0, 12801, hit=12800) for _ in range(2)]
    simulate(two, System(engine, 2, store=store))
    assert [r.ttft for r in two] == pytest.approx([2 * 12800 * 1e5 / 5e9 + 0.002] * 2)  # they share it


@pytest.mark.parametrize("layerwise, longer, shorter", [(True, 1.0, 0.05), (False, 1.0, 0.5)])
def test_loading_and_computing_overlap_layer_by_layer(layerwise, longer, shorter):
    """1 s of loading and 0.5 s of computing, in ten layers: the longer, and a tenth of the other."""
    store = Store(token_bytes=1.0, read=1000.0, block_tokens=100)
    request = Request(0, 1500, hit=1000)
    simulate([request], System(Engine(Costs(token_s=1e-3), layers=10, layerwise=layerwise), 1, store=store))
    assert request.ttft == pytest.approx(longer + shorter)


def test_decoding_takes_a_step_a_token():
    costs = Costs(token_s=1e-3, decode_s=0.02, sequence_s=0.001, context_s=1e-6)
    request = Request(0, 100, output=51)
    simulate([request], System(Engine(costs), 1))
    steps = sum(0.021 + 1e-6 * (100 + i) for i in range(50))
    assert request.ttft == pytest.approx(0.1) and request.end - request.first == pytest.approx(steps)


def test_one_that_comes_while_others_decode_begins_with_the_next_step():
    costs = Costs(token_s=1e-3, decode_s=0.1)
    load = [Request(0, 100, output=101), Request(1.03, 100)]
    simulate(load, System(Engine(costs), 1))
    assert load[1].ttft == pytest.approx(0.07 + 0.1 + 0.1)  # the step under way ends; then a token of the other, too


def test_prefill_and_decode_apart():
    """Computed, stored, loaded; the decode engine computes what is not in whole blocks."""
    costs = Costs(token_s=1e-3, decode_s=0.1)
    store = Store(token_bytes=1.0, read=1280.0, write=640.0, block_tokens=128)
    request = Request(0, 1300, output=11)
    simulate([request], System(Engine(costs), 1, Engine(costs, layerwise=False), 1, store))
    assert request.first == pytest.approx(1.3 + 2.0 + 1.0 + 0.02) and request.end == pytest.approx(request.first + 1.0)
    request = Request(0, 1300, output=11)
    simulate([request], System(Engine(costs), 1, Engine(costs, layerwise=False), 1, store, link=2598.0))
    assert request.first == pytest.approx(1.3 + 0.5 + 0.001)


def test_what_does_not_fit_waits():
    engine = Engine(Costs(decode_s=0.1), kv_tokens=250)
    load = [Request(0, 100, output=11) for _ in range(4)]
    simulate(load, System(engine, 1))
    assert [round(r.first, 6) for r in load] == [0, 0, 1.0, 1.0]


def test_a_closed_loop():
    engine = Engine(Costs(token_s=1e-3), batched_tokens=100)
    load = [Request(0, 100) for _ in range(12)]
    result = simulate(load, System(engine, 1), concurrency=4)
    assert result.seconds == pytest.approx(1.2)
    assert [r.ttft for r in load[4:]] == pytest.approx([0.4] * 8)


# ---- measured tables ----

def table(name):
    return costs.read_table(PLANNING / f"{name}.csv")


def system(config, **kwargs):
    model = costs.geometry(json.loads((PLANNING / f"{config}.json").read_text()))
    return System(Engine(layers=model.layers, **kwargs), 1, store=Store(model.token_bytes))


def foretold(rows, base):
    x = costs.calibrate(rows, base)
    return {(r["prompt"], r["concurrency"], r["hit"]): e for r, _, e in costs.errors(rows, costs.with_costs(base, x))}


@pytest.mark.parametrize("config, name, median, worst, beyond", [
    ("qwq-32b", "qwq-32b-4xh100", 0.05, 0.20, ()),
    # 16 prompts of 32000 tokens are more than fit into the engine at a time: below
    ("deepseek-r1", "deepseek-r1-awq-8xh100", 0.06, 0.25, [(32000, 16, 0), (32000, 16, 0.8)]),
])
def test_one_at_a_time_foretells_eight_and_sixteen(config, name, median, worst, beyond):
    got = foretold(table(name), system(config))
    assert len(got) == 24
    sizes = [abs(e) for key, e in got.items() if key not in beyond]
    assert statistics.median(sizes) < median and max(sizes) < worst
    assert max(abs(e) for key, e in got.items() if key[1] == 1) < 0.05  # what was fitted


def test_what_does_not_fit_into_the_engine_explains_the_last_two():
    """320 k tokens of a latent fit beside the weights; answers of 1000 tokens, 21 ms each."""
    base = system("deepseek-r1", kv_tokens=320_000, costs=Costs(decode_s=0.021))
    got = foretold([{**r, "output": 1000} for r in table("deepseek-r1-awq-8xh100")], base)
    assert max(abs(got[32000, 16, hit]) for hit in (0, 0.8)) < 0.15


GLM = System(Engine(layers=78, batched_tokens=8000, sequences=4), 4, Engine(Costs(decode_s=0.0645), sequences=4), 8,
             Store(78 * 704 * 2), link=INF)
# costs.calibrate(rows of hit 0 and 0.8, GLM, ["prompt_s", "token_s", "read"]) finds them in half a minute
GLM_FITTED = {"prompt_s": 2.605, "token_s": 1.277e-4, "read": 11.5e9}


def test_large_expert_parallelism():
    """Four prefill and eight decode engines, 128 prompts at once; three figures fitted to six of the eight rows."""
    got = costs.errors(table("glm-5.1-4p8d"), costs.with_costs(GLM, GLM_FITTED))
    sizes = [abs(e) for _, _, e in got]
    assert statistics.median(sizes) < 0.10 and max(sizes) < 0.35
    ms = {(r["prompt"], r["hit"]): ms for r, ms, _ in got}
    for n in (32000, 64000, 128000):  # the shape: longer is later, and what is hit is sooner
        assert ms[n, 0.8] < 0.7 * ms[n, 0] and (n == 128000 or ms[n, 0.8] < ms[n, 0.2] < ms[n, 0] < ms[2 * n, 0])


# ---- what must hold of any answer ----

def p90(load, s):
    return plan.measure(load, s).ttft["p90"]


def test_more_is_never_worse():
    load = poisson(4.0, 300, 8000, output=100, hit=6400)
    costs = Costs(token_s=4e-5, square_s=2e-10, decode_s=0.02, sequence_s=3e-4)
    base = System(Engine(costs), 2, Engine(costs, layerwise=False), 4, Store(262144.0, read=4e10, write=1e10))
    for one in ([replace(base, store=replace(base.store, read=x)) for x in (1.5e10, 2e10, 1e11, INF)],
                [replace(base, store=replace(base.store, write=x)) for x in (3e9, 1e10, INF)],
                [replace(base, prefills=n) for n in (1, 2, 4, 8)], [replace(base, decodes=n) for n in (2, 4, 8)]):
        times = [p90(load, s) for s in one]
        # 5 %: the order in which they are served, and more engines load more at the same time
        assert all(b <= a * 1.05 for a, b in zip(times, times[1:])), times
    fast = replace(base, store=replace(base.store, read=INF))
    hits = [p90([replace(r, hit=h) for r in load], fast) for h in (0, 3200, 6400)]
    assert hits == sorted(hits, reverse=True)


def test_least():
    for limit in (1, 2, 7, 8, 100):
        assert plan.least(lambda n: n >= limit, 1, 100) == limit
    assert plan.least(lambda n: False, 1, 100) is None
    assert plan.least_rate(lambda r: r >= 5e9, 1e6, 1e13) == pytest.approx(5e9, rel=0.03)


@pytest.mark.parametrize("config, active, total, token_bytes", [
    ("qwq-32b", 32e9, 32e9, 262144), ("deepseek-r1", 37.5e9, 671e9, 70272)])
def test_geometry(config, active, total, token_bytes):
    g = costs.geometry(json.loads((PLANNING / f"{config}.json").read_text()))
    assert g.active == pytest.approx(active, rel=0.03) and g.total == pytest.approx(total, rel=0.03)
    assert g.token_bytes == token_bytes


# ---- the command ----

QWQ = ["--model", str(PLANNING / "qwq-32b.json")]
H100 = [*QWQ, "--gpus", "4", "--gpu-tflops", "989", "--gpu-gbs", "3350", "--gpu-gib", "80"]
LOAD = ["--rate", "4", "--prompt", "16000", "--output", "300", "--hit", "0.8", "--ttft-p90", "3", "--tpot", "0.05",
        "--requests", "200"]


def run(*args):
    return subprocess.run([sys.executable, "-m", "ucm.plan", *args], capture_output=True, text=True, cwd="/", timeout=120)


def asked(capsys, *args):
    assert plan.main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_answer_meets_what_was_asked(capsys):
    for pd in ("mixed", "store", "p2p"):
        answer = asked(capsys, *H100, *LOAD, "--pd", pd)
        for row in answer["plans"]:
            assert row["ttft"]["p90"] <= 3 and row["tpot"]["p90"] <= 0.05
            assert row["read_gbs"] > 0 and (row["decode_engines"] > 0) == (pd != "mixed")
        assert answer["assumptions"] and answer == asked(capsys, *H100, *LOAD, "--pd", pd)


def test_what_costs_nothing_is_not_asked_for(capsys):
    row = asked(capsys, *H100, "--rate", "1", "--prompt", "1000", "--hit", "0")["plans"][0]
    assert row["read_gbs"] == 0 and row["write_gbs"] > 0 and row["prefill_engines"] == 1


def test_given_and_asked(capsys):
    """What one question answers is enough for the other."""
    first = asked(capsys, *H100, *LOAD, "--pd", "store")["plans"][0]
    given = ["--read-gbs", str(first["read_gbs"] * 1.01), "--write-gbs", str(first["write_gbs"])]
    again = asked(capsys, *H100, *LOAD, "--pd", "store", *given)["plans"][0]
    assert (again["prefill_engines"], again["decode_engines"]) == (first["prefill_engines"], first["decode_engines"])
    counts = ["--prefills", str(first["prefill_engines"]), "--decodes", str(first["decode_engines"])]
    fixed = asked(capsys, *H100, *LOAD, "--pd", "store", *counts)["plans"]
    assert len(fixed) == 1 and fixed[0]["read_gbs"] == pytest.approx(first["read_gbs"])
    calibrated = asked(capsys, *QWQ, "--gpus", "4", "--calibrate", str(PLANNING / "qwq-32b-4xh100.csv"), "--gpu-gbs", "3350",
                       "--rate", "1")
    assert calibrated["plans"][0]["ttft"]["p90"] <= 2


def test_text():
    done = run(*QWQ, "--calibrate", str(PLANNING / "qwq-32b-4xh100.csv"), "--decode-ms", "20,0.3", *LOAD)
    assert done.returncode == 0, done.stderr
    for words in ("error: median", "GB/s", "assumptions\n  - the KV cache of a token takes 256 KiB", "20 ms + 300 us"):
        assert words in done.stdout


def test_traces_of_both_kinds(capsys, tmp_path):
    ours = tmp_path / "trace-host-0.jsonl"
    ours.write_text("".join(json.dumps({
        "timestamp": 500 * i, "input_length": 512, "output_length": 20, "block_tokens": 128,
        "hash_ids": ["a", "b", f"{i % 5}", f"x{i}"]}) + "\n" for i in range(60)))
    moon = tmp_path / "mooncake.jsonl"
    moon.write_text("".join(json.dumps({
        "timestamp": 500 * i, "input_length": 1024, "output_length": 20, "hash_ids": [0, i + 1]}) + "\n" for i in range(60)))
    for path, distinct, block, hits in ((ours, 67, 128, (59 * 2 + 55) / 240), (moon, 61, 512, 59 / 120)):
        answer = asked(capsys, *H100, "--trace", str(path))
        storage = answer["storage"]
        assert storage["working_set_tib"] == pytest.approx(distinct * block * 262144 / 2**40, abs=1e-3)
        assert list(storage["hit_ratio_by_tib"].values())[-1] == pytest.approx(hits, abs=1e-3)
        assert answer["plans"][0]["prefill_engines"] == 1


@pytest.mark.parametrize("args, words", [
    ([], "--model: the model's config.json is needed"),
    ([*QWQ, "--rate", "4"], "--calibrate"),
    ([*H100, "--rate", "0"], "--rate: 0: give more than 0"),
    ([*H100, "--rate", "x"], "--rate: 'x' is not a number"),
    ([*H100, *LOAD, "--hit", "1.5"], "--hit: 1.5: give 0 up to 1"),
    ([*H100, *LOAD, "--ttft-p90", "0.01"], "--ttft-p90 0.01 s"),
    ([*H100, *LOAD, "--prefills", "1", "--read-gbs", "0.1"], "--read-gbs 0.1"),
    ([*QWQ, "--gpu-tflops", "989", "--gpu-gbs", "3350", "--gpu-gib", "40", "--rate", "1"], "--gpu-gib: 40"),
    ([*QWQ, "--gpu-tflops", "989", "--gpu-gbs", "3350", "--decode-ms", "20", "--rate", "1"], "--decode-ms: '20'"),
    (["--model", "/nowhere/config.json"], "/nowhere/config.json"),
    ([*H100, "--trace", "/nowhere/trace"], "/nowhere/trace"),
])
def test_errors_name_the_key_the_value_and_the_remedy(args, words, capsys):
    try:
        status = plan.main(args)
    except SystemExit as e:
        status = e.code
    assert status == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [
    ("prompt,concurrency,hit\n1,1,0\n", "not a row of"),
    ("prompt,concurrency,hit,ttft_ms\n0,1,0,5\n", "above 0"),
    ("prompt,concurrency,hit,ttft_ms\n4000,1,0,5\n", "two lengths"),
])
def test_tables_that_are_none(text, words, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(costs.Wrong, match=words):
        costs.read_table(path)


def test_a_config_that_is_none(tmp_path):
    with pytest.raises(costs.Wrong, match="num_hidden_layers: None"):
        costs.geometry({"hidden_size": 1})


PAGE = (PLANNING.parents[1] / "docs" / "planning.md").read_text().replace("\\\n", "")
COMMANDS = [line for text in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in text.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_page_shows(command, capsys):
    words = command.replace("examples/planning", str(PLANNING)).split()
    assert words[:2] == ["ucm", "plan"] and plan.main(words[2:]) == 0
    out = capsys.readouterr().out
    if "--pd" in words:
        table = [line.split() for line in out.splitlines()[:3]]
        assert all(line in [shown.split() for shown in PAGE.splitlines()] for line in table)
