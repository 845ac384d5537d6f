# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers behind the real proxy: what is prefilled here is found there, the answers are those of one
engine, and whoever dies under load, each request ends in the right answer or an error.  Slow, for vLLM starts
five times: `make test-pd`."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import threading
from pathlib import Path

import models
import pytest
from engine import UCM
from pd import BLOCK, OPTIONS, PROXY, TOKENS
from server import ANSWER_S, Failed, Proxy, Server, complete

REQUESTS, CLIENTS = 12, 4
LENGTHS = (500, 1300, 700)


@pytest.fixture(scope="module")
def servers(work, model):
    """Two prefillers, two decoders."""
    (work / "store").mkdir()
    config = work / "ucm.yaml"
    config.write_text(json.dumps({"ucm_connectors": [{
        "ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": {
            "store_pipeline": "Cache|Posix", "storage_backends": str(work / "store"), "cache_buffer_capacity_gb": 0.25,
            "posix_segment_mb": 16}}], "use_layerwise": False}))
    with contextlib.ExitStack() as stack:
        all_of = [[stack.enter_context(Server(
            model, work / f"{role}-{i}.log", {**UCM, "kv_role": role, "kv_connector_extra_config": {
                "UCM_CONFIG_FILE": str(config)}}, *OPTIONS))
            for i in range(2)] for role in ("kv_producer", "kv_consumer")]
        for server in itertools.chain(*all_of):
            server.wait()
        yield all_of


@pytest.fixture(scope="module")
def proxy(work, servers):
    prefillers, decoders = servers
    with Proxy(work / "proxy.log", prefillers[:1], decoders[:1], PROXY) as proxy:
        proxy.wait()
        yield proxy
        assert proxy.stop() == 0


def test_decoder_computes_less_than_a_block_and_answers_the_same(servers, proxy, model, reference):
    (prefiller, _), (decoder, _) = servers
    prompts = [models.prompt(n, seed) for seed, n in enumerate(LENGTHS)]
    for i, (prompt, expected) in enumerate(zip(prompts, reference(prompts))):
        assert complete(proxy.port, model, prompt, TOKENS, stream=i % 2 == 1).tokens == expected
    blocks = [n // BLOCK for n in LENGTHS]
    assert prefiller.hits() == [(n, 0, 0) for n in blocks]
    assert decoder.hits() == [(n, 0, n) for n in blocks]


def test_the_engines_own_pages_come_through(proxy):
    assert proxy.ask("GET", "/v1/models")[0] == 200
    assert proxy.ask("GET", "/version")[0] == 200
    status, text = proxy.ask("POST", "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": -1})
    assert status == 400 and "max_tokens" in text


def test_whoever_dies_under_load(work, servers, model, reference, capsys):
    """One after the other, each while requests are under way: a prefiller, a decoder, the directory, the proxy."""
    prefillers, decoders = servers
    store = work / "store"
    with Proxy(work / "proxy-2p2d.log", prefillers, decoders, [*PROXY, "--health-seconds", "1"]) as proxy:
        proxy.wait()
        deaths = {"prefiller": prefillers[0].close, "decoder": decoders[0].close,
                  "directory": lambda: os.rename(store, work / "gone"), "proxy": proxy.close}
        table = []
        for n, (who, kill) in enumerate(deaths.items()):
            outcomes = under_load(proxy, model, reference, kill, seed=100 * (n + 1))
            table.append(f"{who:<10} killed: " + ", ".join(f"{count} {what}" for what, count in outcomes.items()))
            assert "wrong" not in outcomes, table
            if who in ("prefiller", "directory"):  # nobody needs them
                assert set(outcomes) == {"right"}, table
            if who != "proxy":
                assert under_load(proxy, model, reference, lambda: None, seed=100 * n + 50) == {"right": REQUESTS}
    with capsys.disabled():
        print("", *table, sep="\n")


def under_load(proxy: Proxy, model: Path, reference, kill, seed: int) -> dict[str, int]:
    """How many requests ended how; after the first answer somebody is killed."""
    prompts = [models.prompt(300 + 100 * i, seed + i) for i in range(REQUESTS)]
    first = threading.Event()

    def one(i: int) -> str | list[int]:
        try:
            return complete(proxy.port, model, prompts[i], TOKENS, i % 2 == 1).tokens
        except Failed as e:
            return str(e)[:60]
        finally:
            first.set()

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(one, i) for i in range(REQUESTS)]
        assert first.wait(ANSWER_S)
        kill()
        answers = [a.result(ANSWER_S) for a in answers]
    return collections.Counter(a if isinstance(a, str) else "right" if a == e else "wrong"
                               for a, e in zip(answers, reference(prompts)))
