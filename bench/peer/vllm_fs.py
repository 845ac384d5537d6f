# SPDX-License-Identifier: Apache-2.0
"""The demo's measurement for ucm and for vLLM's own offloading (CPU tier over its fs tier), in one run: the
same model, the same prompts, by turns.  Time to first token of a prompt that is computed and stored, that
comes from disk after a restart, and that comes from DRAM in the same process.

usage: vllm_fs.py [--prompt-tokens N ...] [--rounds N] [--model NAME]; needs what `make demo` installs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
E2E = ROOT / "tests/e2e"
sys.path[:0] = [str(ROOT / "tools/demo")]

import models  # noqa: E402
from zygote import Life, Zygote  # noqa: E402

BLOCK_TOKENS = 128
DRAM = 1 << 30  # bytes, of each
STAGES = ("storing", "disk", "dram")


def pool_of(store: Path) -> Path:
    return Path("/dev/shm") / store.parent.name / store.name


def plain(store: Path) -> dict:
    return {}


def with_ucm(store: Path) -> dict:
    return {"ucm": {"ucm_connectors": [{
        "ucm_connector_name": "UcmPipelineStore",
        "ucm_connector_config": {"store_pipeline": "Cache|Posix", "storage_backends": str(store),
                                 "cache_buffer_capacity_gb": DRAM >> 30, "cache_dir": str(pool_of(store)),
                                 "io_direct": True}}]}}


def with_ucm_asynchronous(store: Path) -> dict:
    options = with_ucm(store)
    options["ucm"]["use_layerwise"] = False
    return options


def with_fs_tier(store: Path) -> dict:
    return {"kv_transfer_config": {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
            "spec_name": "HostTiering", "spec_module_path": "offload_on_cpu",
            "cpu_bytes_to_use": DRAM,
            "secondary_tiers": [{"type": "fs", "root_dir": str(store),
                                 "n_read_threads": 16, "n_write_threads": 16}]}}}


ENGINES = {"plain vLLM": plain, "ucm": with_ucm, "ucm, asynchronous": with_ucm_asynchronous,
           "vLLM fs tier": with_fs_tier}


def await_pool(store: Path) -> None:
    """ucm allocates its pool in a thread, beside the first requests; vLLM does before it takes any."""
    files = list(pool_of(store).iterdir())
    deadline = time.monotonic() + 60
    while files and sum(f.stat().st_blocks * 512 for f in files) < DRAM * 0.95 and time.monotonic() < deadline:
        time.sleep(0.05)


def ask(life: Life, prompt: list[int]) -> dict:
    return life.call("ask", [prompt], 16)[0]


def settle(life: Life, store: Path, blocks: int) -> None:
    """vLLM's tiers write between steps: small requests give it steps until all is on disk."""
    deadline = time.monotonic() + 60
    while sum(1 for _ in store.rglob("*.bin")) < blocks and time.monotonic() < deadline:
        life.call("ask", [models.prompt(20, seed=9000)], 2)


def measure(zygote: Zygote, args, work: Path, model: Path, length: int) -> dict[str, dict[str, list]]:
    results = {name: {stage: [] for stage in STAGES} for name in ENGINES}
    for turn in range(args.rounds):
        prompt = models.prompt(length, seed=100 * length + turn)
        order = list(ENGINES) if turn % 2 == 0 else list(ENGINES)[::-1]
        for name in order:
            store = work / f"store-{name.replace(' ', '-')}-{length}-{turn}"
            store.mkdir()
            pool_of(store).mkdir(parents=True)
            for life_number in range(1 if name == "plain vLLM" else 2):
                log = work / f"{store.name}-{life_number}.log"
                with zygote.life(log, "Engine", model, **ENGINES[name](store)) as life:
                    life.call("ask", [models.prompt(700, seed=8000 + life_number)], 2)
                    await_pool(store)
                    for stage in STAGES[1:] if life_number else STAGES[:1]:
                        results[name][stage].append(ask(life, prompt))
                    if not life_number and name == "vLLM fs tier":
                        settle(life, store, length // BLOCK_TOKENS)
            shutil.rmtree(store)
            shutil.rmtree(pool_of(store))
        print(f"{length} tokens, round {turn + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return results


def figure(length: int, name: str, stages: dict[str, list], truth: list[list[int]]) -> dict:
    """Medians; the fewest tokens that any answer of a stage took from storage, as vLLM counts them."""
    row = {"prompt": length, "engine": name,
           "identical": all([a["tokens"] for a in answers] == truth for answers in stages.values() if answers)}
    for stage, answers in stages.items():
        if answers:
            row[stage] = statistics.median(a["ttft_s"] for a in answers)
            row[f"{stage}_tokens"] = min(a["cached"] or 0 for a in answers)
    return row


def print_row(row: dict) -> None:
    times = "".join(f"{row[s]:>10.3f} s" if s in row else f"{'-':>12}" for s in STAGES)
    hits = "".join(f"{row[s + '_tokens']:>8}" if s in row else f"{'-':>8}" for s in STAGES[1:])
    print(f"{row['prompt']:>7}  {row['engine']:<18}{times}{hits}  {'yes' if row['identical'] else 'NO'}", flush=True)


def compare(zygote: Zygote, args, work: Path) -> list[dict]:
    model = zygote.run(work / "model.log", "Maker", "make", args.model, ROOT / ".cache" / "models")
    print(f"{'prompt':>7}  {'engine':<18}" + "".join(f"{stage:>12}" for stage in STAGES)
          + f"{'tokens':>8}{'tokens':>8}  identical")
    figures = []
    for length in args.prompt_tokens:
        results = measure(zygote, args, work, model, length)
        truth = [a["tokens"] for a in results["plain vLLM"]["storing"]]
        for name, stages in results.items():
            figures.append(figure(length, name, stages, truth))
            print_row(figures[-1])
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[6000, 3037])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=models.MODELS, default="llama-75m")
    args = parser.parse_args()
    (ROOT / ".cache").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="peer-", dir=ROOT / ".cache"))
    try:
        with Zygote(work / "vllm.log", {"PYTHONPATH": str(E2E)}) as zygote:
            figures = compare(zygote, args, work)
        print(json.dumps(figures))
        return 0 if all(f["identical"] for f in figures) else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(pool_of(work / "any").parent, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
