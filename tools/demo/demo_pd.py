# SPDX-License-Identifier: Apache-2.0
"""Prefill here, decode there, for real: vLLM servers that share nothing but a directory, behind ucm-proxy.

First one prefiller and one decoder, then two of each, the first ones included.  Every prompt is asked through
the proxy, half of the answers as streams, `--clients` at once; the answers must be those of one server without
ucm, and a decoder may compute less than one block of each prompt.

The last line is a JSON object.  The exit status is 0 if nothing is other than promised.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import models
from demo import ROOT, say
from engine import UCM
from server import Answer, Program, Proxy, Server, complete
from zygote import Zygote

BLOCK = 128
LENGTHS = (500, 1300, 700, 3000, 150, 2048)


def reference(zygote: Zygote, args, work: Path, model: Path, prompts: list[list[int]]) -> list[list[int]]:
    with zygote.life(work / "single.log", "Engine", model) as engine:
        return [engine.call("ask", [p], args.new_tokens)[0]["tokens"] for p in prompts]


def start(args, stack: contextlib.ExitStack, work: Path, model: Path, name: str, role: str) -> Server:
    config = work / f"{name}.yaml"
    config.write_text(json.dumps({"ucm_connectors": [{
        "ucm_connector_name": "UcmPipelineStore",
        "ucm_connector_config": {"store_pipeline": "Cache|Posix", "storage_backends": str(work / "store"),
                                 "share_buffer_enable": False, "cache_buffer_capacity_gb": 0.25}}],
        "use_layerwise": True}))  # a pool of its own, as on a node of its own
    return stack.enter_context(Server(
        model, work / f"{name}.log", {**UCM, "kv_role": role, "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(config)}},
        "--skip-tokenizer-init", "--max-model-len", "8192", "--enable-prompt-tokens-details"))


def ask_all(args, proxy: Program, model: Path, prompts: list[list[int]]) -> list[tuple[Answer, float]]:
    def one(i: int) -> tuple[Answer, float]:
        begin = time.monotonic()
        return complete(proxy.port, model, prompts[i], args.new_tokens, i % 2 == 1), time.monotonic() - begin

    with concurrent.futures.ThreadPoolExecutor(args.clients) as clients:
        return list(clients.map(one, range(len(prompts))))


def served(proxy: Program) -> dict[str, int]:
    """Calls of each instance, health checks among them."""
    return {f"{role} {address.rpartition(':')[2]}": int(n) for role, address, n in re.findall(
        r'ucm_proxy_instance_calls_total\{role="(\w+)",instance="([^"]+)"\} (\d+)', proxy.ask("GET", "/metrics")[1])}


def run(args, work: Path) -> int:
    (work / "store").mkdir()
    command = [sys.executable, ROOT / "ucm" / "pd" / "toy_proxy_server.py"]
    with Zygote(work / "vllm.log") as zygote:
        model = zygote.run(work / "model.log", "Maker", "make", args.model, ROOT / ".cache" / "models")
        sets = {f"{n}p{n}d": [models.prompt(length, 1000 * n + i) for i, length in enumerate(LENGTHS * n)]
                for n in (1, 2)}
        say("one server without ucm answers first")
        expected = {name: reference(zygote, args, work, model, prompts) for name, prompts in sets.items()}
    rows, wrong = [], []
    with contextlib.ExitStack() as stack:
        say("starting two prefillers and two decoders, which share a directory")
        servers = {role: [start(args, stack, work, model, f"{role}-{i}", role) for i in (1, 2)]
                   for role in ("kv_producer", "kv_consumer")}
        for both in servers.values():
            for server in both:
                server.wait()
                say(f"{server.log.stem} is up")
        for name, prompts in sets.items():
            n = int(name[0])
            proxy = stack.enter_context(Proxy(work / f"proxy-{name}.log", servers["kv_producer"][:n],
                                              servers["kv_consumer"][:n], command))
            proxy.wait()
            answers = ask_all(args, proxy, model, prompts)
            computed = [len(p) - (a.cached or 0) for p, (a, _) in zip(prompts, answers)]
            rows.append({"name": name, "requests": len(prompts), "computed": max(computed),
                         "identical": [a.tokens for a, _ in answers] == expected[name],
                         "seconds": statistics.mean(s for _, s in answers), "served": served(proxy)})
            say(f"{name}: {len(prompts)} requests answered")
            if proxy.stop() != 0:
                wrong.append(f"{name}: the proxy ended with {proxy.process.returncode}")
    print(f"\n{'':<6}{'requests':>9}{'mean time':>11}{'computed by a decoder':>24}  identical  calls by instance")
    for r in rows:
        print(f"{r['name']:<6}{r['requests']:>9}{r['seconds']:>9.2f} s{r['computed']:>10} tokens at most  "
              f"{'yes' if r['identical'] else 'NO':<9}  {', '.join(f'{k}: {v}' for k, v in r['served'].items())}")
    figures = {"identical": all(r["identical"] for r in rows), "decode_computed_tokens_max": max(r["computed"] for r in rows),
               "requests": sum(r["requests"] for r in rows)}
    if not figures["identical"]:
        wrong.append("the answers are not those of one server")
    if figures["decode_computed_tokens_max"] >= BLOCK:
        wrong.append("a decoder computed more than a block of a prompt")
    for what in wrong:
        print(f"Not as promised: {what}.")
    print(json.dumps(figures))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODELS, default="llama-tiny")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--clients", type=int, default=4, help="requests at once")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the store")
    args = parser.parse_args()
    (ROOT / ".cache").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="demo-pd-", dir=ROOT / ".cache"))
    status = 2
    try:
        status = run(args, work)
    finally:
        if args.keep or status:
            say(f"logs and store: {work.relative_to(ROOT)}")
        else:
            shutil.rmtree(work)
    return status


if __name__ == "__main__":
    sys.exit(main())
