# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with ucm, and `vllm bench serve` against it three times with the same prompts: cold, again (from
DRAM), and after the server was started anew (from disk).  What a user of the guides does, on a small model.

usage: serve.py [--data-parallel-size N] [--num-prompts N] [--random-input-len N] [--random-output-len N]; needs
what `make demo` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools/demo"))

import models  # noqa: E402
from engine import SETTINGS, UCM  # noqa: E402
from server import HERE, Server  # noqa: E402
from zygote import Zygote  # noqa: E402

BENCH_S = 1800
FIGURES = ("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "duration", "completed")


def start(args, work: Path, model: Path, tokenizer: Path, name: str) -> Server:
    config = work / "ucm_config.yaml"
    config.write_text(json.dumps({"ucm_connectors": [{
        "ucm_connector_name": "UcmPipelineStore",
        "ucm_connector_config": {"store_pipeline": "Cache|Posix", "storage_backends": str(work / "store"),
                                 "cache_buffer_capacity_gb": 2}}],
        "enable_event_sync": True, "use_layerwise": True}))
    return Server(
        model, work / f"{name}.log",
        {**UCM, "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
         "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(config)}},
        "--tokenizer", tokenizer, "--data-parallel-size", args.data_parallel_size, "--tensor-parallel-size", 1,
        "--seed", 1024, "--max-model-len", 17000, "--max-num-batched-tokens", 8000, "--max-num-seqs", 20)


def bench(args, work: Path, server: Server, tokenizer: Path, name: str) -> dict:
    command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "vllm", "--model", server.model,
               "--tokenizer", tokenizer, "--host", HERE, "--port", server.port, "--seed", 123456,
               "--dataset-name", "random", "--num-prompts", args.num_prompts,
               "--random-input-len", args.random_input_len, "--random-output-len", args.random_output_len,
               "--request-rate", "inf", "--ignore-eos", "--disable-tqdm",
               "--save-result", "--result-dir", work, "--result-filename", f"{name}.json"]
    done = subprocess.run([str(c) for c in command], env={**os.environ, **SETTINGS}, timeout=BENCH_S,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    result = {} if done.returncode else json.loads((work / f"{name}.json").read_text())
    if result.get("completed") != args.num_prompts:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}, {result.get('completed')} answers:\n"
                           f"{done.stdout[-3000:]}\nthe server's log:\n{server.log.read_text()[-3000:]}")
    return {key: result[key] for key in FIGURES}


def measure(args, work: Path, model: Path, tokenizer: Path) -> dict[str, dict]:
    results = {}
    for life, names in (("first", ("cold", "again")), ("restarted", ("restarted",))):
        with start(args, work, model, tokenizer, life) as server:
            server.wait()
            print(f"the server is up ({life})", file=sys.stderr, flush=True)
            for name in names:
                results[name] = bench(args, work, server, tokenizer, name)
                asked = server.hits()[-args.num_prompts:]
                results[name] |= {"blocks": sum(t for t, _, _ in asked), "hits": sum(h for _, _, h in asked)}
                print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
            for line in [text for text in server.log.read_text().splitlines() if "request_id:" in text][-2:]:
                print("  " + line[line.index("INFO"):], file=sys.stderr)
            server.stop()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODELS, default="llama-75m")
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=10)
    parser.add_argument("--random-input-len", type=int, default=8000)
    parser.add_argument("--random-output-len", type=int, default=16)
    args = parser.parse_args()
    (ROOT / ".cache").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="serve-", dir=ROOT / ".cache"))
    try:
        (work / "store").mkdir()
        with Zygote(work / "vllm.log") as zygote:
            model = zygote.run(work / "model.log", "Maker", "make", args.model, ROOT / ".cache" / "models")
            tokenizer = zygote.run(work / "model.log", "Maker", "make_tokenizer", work / "tokenizer")
        results = measure(args, work, model, tokenizer)
        print(f"{'':<11}" + "".join(f"{key:>16}" for key in (*FIGURES, "blocks", "hits")))
        for name, row in results.items():
            print(f"{name:<11}" + "".join(f"{row[key]:>16.1f}" for key in (*FIGURES, "blocks", "hits")))
        print(json.dumps(results))
    finally:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
