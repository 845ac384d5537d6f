# SPDX-License-Identifier: Apache-2.0
"""What a step of an engine takes: from the model and the GPU's figures, or fitted to a table of measured times."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math

from .simulate import INF, Costs, Request, simulate

GB = 1e9
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}


class Wrong(ValueError):
    """What was asked cannot be answered; the text names the key, the value and the remedy."""


# ---- the model ----

@dataclasses.dataclass(frozen=True)
class Geometry:
    layers: int
    token_bytes: float  # KV cache of a token, all ranks together, a latent once
    latent: bool  # each rank keeps all of it
    active: float  # parameters a token meets
    total: float
    square_flops: float  # a prompt of n tokens: n^2 of these in attention
    sparse_flops: float  # a token's attention where it is bounded


def geometry(config, kv_dtype="bfloat16"):
    c = config.get("text_config", config)

    def need(key):
        if not isinstance(c.get(key), (int, float)) or c[key] <= 0:
            raise Wrong(f"--model: {key}: {c.get(key)!r} in config.json; a decoder's configuration as Hugging Face has "
                        "it is needed")
        return c[key]
    layers, hidden, heads = need("num_hidden_layers"), need("hidden_size"), need("num_attention_heads")
    if c.get("kv_lora_rank"):
        rank, rope, nope, v = (need(k) for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        q = c.get("q_lora_rank") or 0
        query = q * (hidden + heads * (nope + rope)) if q else hidden * heads * (nope + rope)
        attention = query + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
        elements, dims = rank + rope + (c.get("index_head_dim") or 0), nope + rope + v
    else:
        kv, dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or hidden // heads
        attention = 2 * hidden * dim * (heads + kv)
        elements, dims = 2 * kv * dim, 2 * dim
    experts = next((c[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if c.get(k)), 0)
    dense = c.get("first_k_dense_replace", 0) if experts else layers
    expert = 3 * hidden * (c.get("moe_intermediate_size") or need("intermediate_size"))
    shared = c.get("n_shared_experts") or 0
    mlp = dense * 3 * hidden * need("intermediate_size") if dense else 0
    vocabulary = hidden * (c.get("vocab_size") or 0)
    common = layers * attention + mlp + vocabulary
    used = need("num_experts_per_tok") if experts else 0
    square = layers * heads * dims
    sparse = c.get("index_topk") or 0
    return Geometry(layers, layers * elements * DTYPES[kv_dtype], bool(c.get("kv_lora_rank")),
                    common + (layers - dense) * expert * (used + shared),
                    common + (layers - dense) * expert * (experts + shared),
                    0 if sparse else square, 2 * square * sparse)


# ---- what engines cost ----

def from_gpu(model, o):
    """Costs from the GPU's figures."""
    flops = o.gpu_tflops * 1e12 * o.gpus * o.mfu
    moved = o.gpu_gbs * GB * o.mbu
    weights = model.total * o.weight_bits / 8
    each = model.token_bytes / (1 if model.latent else o.gpus)  # of a token on a GPU
    return Costs(token_s=(2 * model.active + model.sparse_flops) / flops, square_s=model.square_flops / flops,
                 decode_s=weights / o.gpus / moved, sequence_s=2 * model.active / flops, context_s=each / moved,
                 request_s=o.request_ms / 1e3)


def kv_tokens(model, o):
    if not o.gpu_gib:
        return INF
    each = model.token_bytes / (1 if model.latent else o.gpus)
    weights = model.total * o.weight_bits / 8 / o.gpus
    left = (0.9 * o.gpu_gib - 2) * 2**30 - weights
    if left < each * (o.prompt + o.output):
        raise Wrong(f"--gpu-gib: {o.gpu_gib:g}: beside {weights / 2**30:.1f} GiB of weights a GPU"
                    " has no room for one request; give more --gpus or fewer --weight-bits")
    return left / each


COLUMNS = {"prompt": int, "concurrency": int, "hit": float, "ttft_ms": float, "output": int}


def read_table(path):
    """Rows of prompt,concurrency,hit,ttft_ms[,output]: so many equal prompts at once, their mean time to first token."""
    with open(path, newline="") as f:
        lines = list(csv.DictReader(line for line in f if not line.startswith("#")))
    rows = []
    for line in lines:
        try:
            row = {key: kind({"output": 1, **line}[key]) for key, kind in COLUMNS.items()}
        except (KeyError, TypeError, ValueError):
            raise Wrong(f"{path}: {line}: not a row of {','.join(COLUMNS)}") from None
        least = min(row["prompt"], row["concurrency"], row["output"])
        if least < 1 or not 0 <= row["hit"] < 1 or not row["ttft_ms"] > 0:
            raise Wrong(f"{path}: {row}: prompt, concurrency, ttft_ms and output are above 0, hit is 0 up to below 1")
        rows.append(row)
    if len({r["prompt"] for r in rows if not r["hit"]}) < 2:
        raise Wrong(f"{path}: at least two lengths of prompt with hit 0 are needed to calibrate")
    return rows


def replay_row(row, system):
    """The mean time to first token of a row of a table."""
    hit = round(row["prompt"] * row["hit"])
    burst = [Request(0, row["prompt"], row["output"], hit) for _ in range(row["concurrency"])]
    simulate(burst, system)
    return sum(r.ttft for r in burst) / len(burst)


FITTED = {"prompt_s": 0.05, "token_s": 5e-5, "square_s": 3e-10, "request_s": 0.03, "read": 10e9}


def with_costs(system, x):
    """The system with fitted figures in their places."""
    costs = {k: v for k, v in x.items() if k != "read"}
    engine = dataclasses.replace(system.prefill, costs=dataclasses.replace(system.prefill.costs, **costs))
    store = dataclasses.replace(system.store, read=x["read"]) if "read" in x else system.store
    return dataclasses.replace(system, prefill=engine, store=store)


def calibrate(rows, system, names=None):
    """Least squares of the logarithms, by steps up and down, of each figure and of one against another, that
    get smaller.  Fitted are the rows of the least concurrency, which leaves the others to check it."""
    least = min(r["concurrency"] for r in rows)
    rows = [r for r in rows if r["concurrency"] == least]
    if names is None:
        lengths = {r["prompt"] for r in rows if not r["hit"]}
        # One at a time says nothing of where a constant is spent: outside, then others do not wait for it.
        names = ["token_s", "request_s" if least == 1 else "prompt_s"]
        names += ["square_s"] * (len(lengths) > 2) + ["read"] * any(r["hit"] for r in rows)
    x = {k: FITTED[k] for k in names}

    def loss(x):
        tried = with_costs(system, x)
        return sum(math.log(replay_row(r, tried) * 1e3 / r["ttft_ms"]) ** 2 for r in rows)
    moves = [{k: 1} for k in names] + [{a: 1, b: -1} for a, b in itertools.combinations(names, 2)]
    best, factor = loss(x), 1.5
    while factor > 1.004:
        before = best
        for move, way in itertools.product(moves, (factor, 1 / factor)):
            tried = {k: v * way ** move.get(k, 0) for k, v in x.items()}
            if (got := loss(tried)) < best:
                best, x = got, tried
        if best > before * 0.9999:
            factor **= 0.5
    return x


def errors(rows, system):
    """[(row, modelled ms, relative error)]"""
    modelled = [replay_row(r, system) * 1e3 for r in rows]
    return [(r, ms, ms / r["ttft_ms"] - 1) for r, ms in zip(rows, modelled)]
