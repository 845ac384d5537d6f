# SPDX-License-Identifier: Apache-2.0
"""How many prefill engines, how many decode engines, what storage?  `ucm plan`, or python -m ucm.plan.

What engines cost comes from a table of measured times to first token (--calibrate), or from the model's
config.json and the GPU's figures.  The load is then played to more and more engines (simulate.py) until the
targets are met, and to less and less bandwidth while they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
from collections import OrderedDict
from pathlib import Path

from . import traces
from .costs import (DTYPES, GB, Wrong, calibrate, errors, from_gpu, geometry, kv_tokens, read_table, with_costs)
from .simulate import INF, Costs, Engine, Request, Store, System, simulate

TIB = 2.0**40
MOST = 4096  # engines


# ---- the load ----

def poisson(o):
    random_ = random.Random(o.seed)
    at, requests = 0.0, []
    for _ in range(o.requests):
        at += random_.expovariate(o.rate)
        requests.append(Request(at, o.prompt, o.output, round(o.prompt * o.hit)))
    return requests


def read_trace(path, block_tokens):
    """A trace of ours or Mooncake's as [(s, prompt, output, ids)], and the tokens in its blocks."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    try:
        ours = not lines or "block_tokens" in json.loads(lines[0])
        rows = list(traces.convert(traces.read([path]))) if ours else [json.loads(line) for line in lines]
        out = [(r["timestamp"] / 1e3, int(r["input_length"]), max(1, int(r["output_length"])), r["hash_ids"])
               for r in rows]
    except (ValueError, TypeError, KeyError) as e:
        raise Wrong(f"--trace: {path}: no trace of enable_record_traces, nor one of Mooncake's: {e}") from None
    if not out:
        raise Wrong(f"--trace: {path}: there are no requests in it")
    if ours:
        block_tokens = traces.read([path])[0]["block_tokens"]
    return sorted(out, key=lambda r: r[0]), block_tokens


def lru_hits(trace, blocks):
    """Blocks of each request that an LRU store of so many blocks has before the first it lacks."""
    kept, hits = OrderedDict(), []
    for _, _, _, ids in trace:
        n = next((i for i, b in enumerate(ids) if b not in kept), len(ids))
        hits.append(n)
        for b in reversed(ids):  # tails go first
            kept[b] = None
            kept.move_to_end(b)
        while len(kept) > blocks:
            kept.popitem(last=False)
    return hits


def from_trace(o, token_bytes):
    """Its requests, at --rate if that is given, with what a store of --disk-tib would have had; and the sizing."""
    trace, tokens = read_trace(o.trace, o.trace_block_tokens)
    distinct = len({b for r in trace for b in r[3]})
    asked = sum(len(r[3]) for r in trace)
    sizes = [max(1, distinct // d) for d in (256, 64, 16, 4, 2, 1)]
    ratios = [sum(lru_hits(trace, n)) / max(1, asked) for n in sizes]
    block = tokens * token_bytes
    enough = next(n for n, ratio in zip(sizes, ratios) if ratio >= 0.95 * ratios[-1])
    kept = int(o.disk_tib * TIB / block) if o.disk_tib else enough
    hits = lru_hits(trace, kept)
    start, span = trace[0][0], max(trace[-1][0] - trace[0][0], 1e-9)
    scale = (len(trace) / span) / o.rate if o.rate else 1.0
    requests = [Request((at - start) * scale, prompt, output, min(prompt, n * tokens))
                for (at, prompt, output, _), n in zip(trace[:o.requests], hits)]
    o.rate = o.rate or len(trace) / span
    sizing = {"working_set_tib": distinct * block / TIB, "disk_tib": kept * block / TIB,
              "hit_ratio_by_tib": {f"{n * block / TIB:.3g}": round(ratio, 4) for n, ratio in zip(sizes, ratios)}}
    half = next(n for n, ratio in zip(sizes, ratios) if ratio >= 0.5 * ratios[-1])
    return requests, {**sizing, "dram_tib_for_half_of_the_hits": half * block / TIB}


# ---- the answer ----

def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


@dataclasses.dataclass
class Figures:
    ttft: dict
    tpot: dict
    prefill_busy: float
    decode_busy: float
    read: float  # bytes/s
    write: float


def measure(load, system):
    requests = [dataclasses.replace(r) for r in load]
    result = simulate(requests, system)
    steady = requests[len(requests) // 10:]  # it begins with nobody there
    q = {f"p{n}": n / 100 for n in (50, 90, 99)}
    return Figures({k: quantile([r.ttft for r in steady], v) for k, v in q.items()},
                   {k: quantile([r.tpot for r in steady], v) for k, v in q.items()},
                   result.prefill_busy, result.decode_busy,
                   result.read / result.seconds, result.written / result.seconds)


def least(fits, low, high):
    """The least integer in low..high that fits, doubling first; None: none does."""
    n = low
    while not fits(n):
        if n >= high:
            return None
        low, n = n + 1, min(2 * n, high)
    while low < n:
        middle = (low + n) // 2
        low, n = (low, middle) if fits(middle) else (middle + 1, n)
    return n


def least_rate(fits, low, high):
    """The least bytes/s that fit, to 3 %."""
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


class Planner:
    def __init__(self, load, system, o):
        self.load, self.o, self.system = load, o, system

    def run(self, prefills, decodes, **store):
        fields = {k: v for k, v in store.items() if v}
        return measure(self.load, dataclasses.replace(
            self.system, prefills=prefills, decodes=decodes,
            store=dataclasses.replace(self.system.store, **fields)))

    def good(self, f):
        return f.ttft["p90"] <= self.o.ttft_p90 and f.tpot["p90"] <= self.o.tpot

    def counts(self):
        """The fewest engines: at first as if storage were no bound, then near there with storage as it is, for more
        engines do not make up for it: they share it."""
        o, many, pd = self.o, min(len(self.load), MOST), self.system.decode is not None

        def free(prefills, decodes):
            return self.good(self.run(prefills, decodes, read=INF, write=INF))

        def near(n, given):
            return [n] if given or not n else sorted({n, n + 1, math.ceil(1.25 * n), math.ceil(1.5 * n), 2 * n, 3 * n})
        decodes = 0 if not pd else o.decodes or least(lambda n: free(o.prefills or many, n), 1, many)
        if decodes is None:
            return None
        prefills = o.prefills or least(lambda n: free(n, decodes), 1, many)
        if prefills is None:
            return None
        pairs = sorted(itertools.product(near(prefills, o.prefills), near(decodes, o.decodes)), key=sum)
        return next((pair for pair in pairs if self.good(self.run(*pair))), None)

    def answer(self):
        o, counts = self.o, self.counts()
        if not counts:
            raise Wrong(self._why_not())
        prefills, decodes = counts
        f = self.run(prefills, decodes)
        def enough(kind, n, **others):
            given = getattr(self.system.store, kind)
            if given < INF or not getattr(f, kind):
                return given if given < INF else 0.0
            fits = lambda rate: self.good(self.run(n, decodes, **{kind: rate}, **others))  # noqa: E731
            return least_rate(fits, (getattr(f, kind) or 1.0) / 4, 1e13)
        rows = []
        for n in sorted({prefills} if o.prefills else {prefills, prefills + 1, prefills * 2}):
            if not self.good(self.run(n, decodes)):
                continue  # more prefill engines can mean more at a time for as few decode engines
            write = enough("write", n)
            if self.system.store.write == INF:
                write = max(1.25 * write, f.write / 0.7)  # a reserve: behind it reads can be slower
                while write and not self.good(self.run(n, decodes, write=write)):
                    write *= 1.25
            read = enough("read", n, write=write)
            g = self.run(n, decodes, read=read, write=write)
            rows.append({"prefill_engines": n, "decode_engines": decodes,
                         "read_gbs": read / GB, "write_gbs": write / GB, **dataclasses.asdict(g)})
        return rows

    def _why_not(self):
        o, store = self.o, self.system.store
        f = measure([dataclasses.replace(max(self.load, key=lambda r: r.prompt - r.hit), at=0.0)], dataclasses.replace(
            self.system, prefills=1, decodes=1 if self.system.decode else 0))
        given = " and ".join(f"--{kind} {n}" for kind in ("prefills", "decodes") if (n := getattr(o, kind))) or "any engines"
        storage = f" and --read-gbs {store.read / GB:g}" if store.read < INF else ""
        return (f"--ttft-p90 {o.ttft_p90:g} s and --tpot {o.tpot:g} s are not met with {given}{storage}: the "
                f"longest request, alone, takes {f.ttft['p90']:.3g} s and {f.tpot['p90']:.3g} s a token; give larger "
                "targets, more --gpus an engine, or faster storage")


def assumptions(o, model, costs, system):
    """What the answer rests on, as sentences."""
    e, store = system.prefill, system.store
    kv = model.token_bytes / 1024
    yield (f"the KV cache of a token takes {kv:.4g} KiB ({model.layers} layers, {o.kv_dtype}), blocks are of "
           f"{store.block_tokens} tokens")
    source = (f"fitted to {o.calibrate}" if o.calibrate else
              f"from {o.gpu_tflops:g} TFLOP/s x {o.gpus} GPUs at {o.mfu:.0%}, {model.active / 1e9:.3g} G parameters "
              "a token")
    yield (f"computing n tokens takes {costs.prompt_s * 1e3:.3g} ms + {costs.token_s * 1e6:.3g} us n + "
           f"{costs.square_s * 1e12:.3g} ps n^2, a request {costs.request_s * 1e3:.3g} ms outside of engines ({source})")
    if not o.rate and not o.trace:
        return
    source = "--decode-ms" if o.decode_ms else f"from {o.gpu_gbs:g} GB/s x {o.gpus} GPUs at {o.mbu:.0%}"
    yield (f"a step that decodes takes {costs.decode_s * 1e3:.3g} ms + {costs.sequence_s * 1e6:.3g} us a sequence + "
           f"{costs.context_s * 1e9:.3g} ns a token of context ({source})")
    room = f"{e.kv_tokens:.0f} tokens of KV cache (--gpu-gib)" if e.kv_tokens < INF else "any KV cache: give --gpu-gib"
    yield f"an engine has room for {e.sequences} sequences and {room}; a step computes up to {e.batched_tokens} tokens"
    yield "loads stream into the step layer by layer" if e.layerwise else "requests wait aside for their loads"
    node = f"at {store.node / GB:.3g} GB/s at most" if store.node < INF else "without a bound of its own (--node-gbs)"
    yield (f"one engine loads and stores {node}; engines share the storage evenly, {store.latency_s * 1e3:g} ms before "
           f"the first byte; {store.dram_share:.0%} of what is loaded is in the engine's own DRAM")
    yield {"mixed": "engines do both, prefill and decode",
           "store": "decode engines load whole prompts from the store, aside, when prefill engines have stored them",
           "p2p": f"prompts go from prefill to decode engines at {o.link_gbs:g} GB/s each, past the store"}[o.pd]
    yield ("requests are those of the trace, hits what an LRU store of that size would have" if o.trace else
           f"{o.requests} requests come at random (Poisson, seed {o.seed}), each hits {o.hit:.0%} of its prompt")
    yield "nothing fails, nothing is preempted, storage is as fast at the end as at the start; keep a reserve"


def show(answer, out):
    w = out.write
    if "table" in answer:
        w("calibration; rows of the least concurrency are fitted, the others foretold\n\n")
        w(f"{'prompt':>8} {'at once':>8} {'hit':>5} {'TTFT ms':>10} {'model':>10} {'error':>7}\n")
        for r in answer["table"]:
            w(f"{r['prompt']:>8} {r['concurrency']:>8} {r['hit']:>5.2f} {r['ttft_ms']:>10.0f} {r['model_ms']:>10.0f} "
              f"{r['error']:>+7.1%}\n")
        w(f"\nerror: median {answer['median_error']:.1%}, worst {answer['worst_error']:.1%}\n\n")
    if "plans" in answer:
        w(" prefill   decode    read GB/s   write GB/s   TTFT p50     p90     p99 s   TPOT p90 ms   busy\n")
        for r in answer["plans"]:
            busy = f", {r['decode_busy']:.0%}" if r["decode_engines"] else ""
            ttft, decodes = r["ttft"], r["decode_engines"]
            w(f"{r['prefill_engines']:>8} {decodes or '-':>8} {r['read_gbs']:>12.3g} {r['write_gbs']:>12.3g} "
              f"{ttft['p50']:>10.2f} {ttft['p90']:>7.2f} {ttft['p99']:>7.2f} {r['tpot']['p90'] * 1e3:>15.1f}   "
              f"{r['prefill_busy']:.0%}{busy}\n")
        w("\nread and write: what the storage must give all engines together\n")
        w("".join(f"{key}: {value}\n" for key, value in answer["storage"].items()))
    w("\nassumptions\n" + "".join(f"  - {line}\n" for line in answer["assumptions"]))


# ---- the command ----

def number(kind, low, high=INF, open_low=True):
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value or (not open_low and value == low)) or not value <= high:
            bound = f"up to {high:g}" if high < INF else "or more" if not open_low else ""
            raise argparse.ArgumentTypeError(f"{text}: give {'more than ' if open_low else ''}{low:g} {bound}".rstrip())
        return value
    return read


above, share, count = number(float, 0), number(float, 0, 1, open_low=False), number(int, 1, open_low=False)


def decode_ms(text):
    try:
        step, each = map(float, text.split(","))
        if step > 0 and each >= 0:
            return {"decode_s": step / 1e3, "sequence_s": each / 1e3, "context_s": 0.0}
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: two numbers are needed, of a step and of each sequence in it, as 20,0.3")


def parser():
    p = argparse.ArgumentParser(prog="ucm plan", description="How many prefill engines, how many decode engines, what "
                                "storage?  By a model of them; its assumptions are printed with its answer.")

    def group(title, rows):
        g = p.add_argument_group(title)
        for name, kind, default, text in rows:
            tail = "" if default in (None, "") else f" (default {default})"
            extra = {"action": "store_true"} if kind is bool else {"type": kind, "default": default, "metavar": "N"}
            if isinstance(kind, tuple):
                extra = {"choices": kind, "default": default}
            elif kind is str:
                extra["metavar"] = "FILE"
            g.add_argument(f"--{name}", help=(text + tail).replace("%", "%%"), **extra)
    group("the load", [
        ("rate", above, None, "requests a second; without it, only the calibration is shown"),
        ("prompt", count, 8000, "tokens of a prompt"),
        ("output", count, 300, "tokens of an answer"),
        ("hit", share, 0.5, "share of a prompt that the store has"),
        ("trace", str, None, "a trace instead, ours (enable_record_traces) or Mooncake's; --rate speeds it up"),
        ("trace-block-tokens", count, 512, "of a trace that does not say"),
        ("requests", number(int, 20, open_low=False), 500, "how many to play"),
        ("seed", number(int, 0, open_low=False), 1, "of their arrival"),
        ("ttft-p90", above, 2.0, "target, seconds"),
        ("tpot", above, 0.1, "target, seconds a token, p90")])
    group("the model and its engines", [
        ("model", str, None, "its config.json (required)"),
        ("kv-dtype", tuple(DTYPES), "bfloat16", "of the KV cache"),
        ("weight-bits", above, 16.0, "of a parameter"),
        ("gpus", count, 1, "of an engine"),
        ("calibrate", str, None, "times to first token of one engine, measured: prompt,concurrency,hit,ttft_ms[,output]"),
        ("gpu-tflops", above, None, "dense, at the precision computed in; instead of --calibrate"),
        ("gpu-gbs", above, None, "bandwidth of its memory, GB/s"),
        ("gpu-gib", above, None, "size of its memory"),
        ("decode-ms", decode_ms, None, "a step that decodes, and a sequence in it, as 20,0.3, measured; instead of --gpu-gbs"),
        ("mfu", number(float, 0, 1), 0.4, "share of --gpu-tflops that is reached"),
        ("mbu", number(float, 0, 1), 0.6, "of --gpu-gbs"),
        ("request-ms", number(float, 0, open_low=False), 20.0, "outside of engines, with --gpu-tflops"),
        ("batched-tokens", count, 8192, "vLLM's --max-num-batched-tokens"),
        ("sequences", count, 256, "vLLM's --max-num-seqs"),
        ("aside", bool, None, "use_layerwise: false")])
    group("where the KV cache goes", [
        ("pd", ("mixed", "store", "p2p"), "mixed", "engines do both, or one kind gets it from the store, or straight"),
        ("prefills", count, None, "given, not asked"),
        ("decodes", count, None, "given, not asked"),
        ("read-gbs", above, None, "what the storage gives; else what it must give is the answer"),
        ("write-gbs", above, None, "the same"),
        ("node-gbs", above, None, "between the storage and one engine"),
        ("link-gbs", above, 20.0, "into one decode engine, with p2p"),
        ("dram-share", share, 0.0, "of what is loaded, is in DRAM"),
        ("copy-gbs", above, None, "from DRAM to an engine"),
        ("latency-ms", number(float, 0, open_low=False), 1.0, "of the storage"),
        ("block-tokens", count, 128, "chunk_tokens"),
        ("disk-tib", above, None, "of the storage, with --trace; else enough for 95 % of the hits"),
        ("keep-hours", above, 24.0, "how long blocks stay, without --trace")])
    p.add_argument("--json", action="store_true", help="one JSON object")
    return p


def plan(o):
    """The answer, as --json prints it."""
    if not o.model:
        raise Wrong("--model: the model's config.json is needed")
    try:
        config = json.loads(Path(o.model).read_text())
    except ValueError as e:
        raise Wrong(f"--model: {o.model}: no JSON: {e}") from None
    model = geometry(config, o.kv_dtype)
    if not o.calibrate and not (o.gpu_tflops and o.gpu_gbs):
        raise Wrong("what do engines cost?  Give --calibrate with a measured table, or --gpu-tflops and --gpu-gbs")
    gb = {k: getattr(o, k + "_gbs") * GB for k in ("read", "write", "node", "copy") if getattr(o, k + "_gbs")}
    store = Store(model.token_bytes, o.block_tokens, dram_share=o.dram_share, latency_s=o.latency_ms / 1e3, **gb)
    costs = Costs(**o.decode_ms) if o.decode_ms else Costs()
    if o.gpu_gbs:
        gpu = from_gpu(model, argparse.Namespace(**{**vars(o), "gpu_tflops": o.gpu_tflops or INF}))
        costs = dataclasses.replace(gpu, **o.decode_ms) if o.decode_ms else gpu
    elif not o.decode_ms and (o.rate or o.trace):
        raise Wrong("what does decoding cost?  Give --decode-ms as measured, or --gpu-gbs")
    engine = Engine(costs, o.batched_tokens, o.sequences, kv_tokens(model, o), model.layers, not o.aside)
    system, answer = System(engine, 1, store=store), {}
    if o.calibrate:
        rows = read_table(o.calibrate)
        blank = dataclasses.replace(costs, prompt_s=0.0, token_s=0.0, square_s=0.0, request_s=0.0)
        alone = System(dataclasses.replace(engine, costs=blank), 1, store=Store(model.token_bytes, o.block_tokens))
        x = calibrate(rows, alone)
        checked = errors(rows, with_costs(alone, x))
        sizes = sorted(abs(e) for _, _, e in checked)
        answer["table"] = [{**r, "model_ms": ms, "error": e} for r, ms, e in checked]
        answer |= {"median_error": sizes[len(sizes) // 2], "worst_error": sizes[-1], "fitted": x}
        costs = with_costs(alone, x).prefill.costs
        if "read" in x and not o.node_gbs:
            store = dataclasses.replace(store, node=x["read"])
    engine = dataclasses.replace(engine, costs=costs)
    if o.rate or o.trace:
        load, storage = from_trace(o, model.token_bytes) if o.trace else (poisson(o), {})
        split = {} if o.pd == "mixed" else {"decode": dataclasses.replace(engine, layerwise=False), "decodes": 1}
        system = System(engine, 1, **split, store=store, link=o.link_gbs * GB if o.pd == "p2p" else None)
        answer["plans"] = Planner(load, system, o).answer()
        written = answer["plans"][0]["write"]
        if not o.trace:
            storage["disk_tib"] = written * o.keep_hours * 3600 / TIB
        longest = max(r.prompt for r in load)
        storage["dram_gib_of_an_engine_at_least"] = 2 * longest * model.token_bytes / 2**30
        answer["storage"] = {k: v if isinstance(v, dict) else round(v, 3) for k, v in storage.items()}
    answer["assumptions"] = list(assumptions(o, model, costs, dataclasses.replace(system, prefill=engine, store=store)))
    return answer


def main(argv=None):
    o = parser().parse_args(argv)
    try:
        answer = plan(o)
    except (OSError, ValueError) as e:
        print(f"ucm plan: {e}", file=sys.stderr)
        return 2
    if o.json:
        print(json.dumps(answer))
    else:
        show(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
