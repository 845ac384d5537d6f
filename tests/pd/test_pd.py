# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers behind the real proxy: what is prefilled here is found there, and the answers are those of one
engine.  Slow, for vLLM starts three times: `make test-pd`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "demo"))

import models  # noqa: E402
from zygote import Zygote  # noqa: E402

START_S, TOKENS, BLOCK = 300, 8, 128
LENGTHS = (500, 1300, 700)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(port: int, method: str, target: str, body: dict | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    with contextlib.closing(connection):
        connection.request(method, target, body and json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()


class Server:
    """vllm serve, as the documents have it."""

    def __init__(self, model: Path, work: Path, role: str, config: Path):
        from engine import SETTINGS

        transfer = {"kv_connector": "UCMConnector", "kv_role": role,
                    "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
                    "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(config)}}
        settings = {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": str(work), "VLLM_HOST_IP": "127.0.0.1"}
        self.port, self.log = free_port(), work / f"{role}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1",
                 "--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init",
                 "--max-model-len", "4096", "--no-enable-prefix-caching", "--block-size", "128",
                 "--kv-transfer-config", json.dumps(transfer)],
                stdout=log, stderr=log, cwd=work, env={**os.environ, **settings}, start_new_session=True)

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                if ask(self.port, "GET", "/health")[0] == 200:
                    return
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.5)

    def hits(self) -> list[tuple[int, int]]:
        """Of each request so far: full blocks, hits in ucm."""
        return [(int(a), int(b)) for a, b in re.findall(r"total_blocks_num: (\d+), hit hbm: 0, hit external: (\d+)",
                                                        self.log.read_text())]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pd")


@pytest.fixture(scope="module")
def model(work) -> Path:
    subprocess.run([sys.executable, "-c", "import models, pathlib, sys; models.make('llama-tiny', pathlib.Path(sys.argv[1]))",
                    str(work)], cwd=ROOT / "tools" / "demo", check=True)
    return work / "llama-tiny"


@pytest.fixture(scope="module")
def expected(work, model) -> list[list[int]]:
    """What one engine without ucm answers."""
    prompts = [models.prompt(n, seed) for seed, n in enumerate(LENGTHS)]
    with Zygote(work / "zygote.log", {"TMPDIR": str(work)}) as zygote:
        with zygote.life(work / "reference.log", "Engine", model) as engine:
            return [a["tokens"] for a in engine.call("ask", prompts, TOKENS)]


@pytest.fixture(scope="module")
def servers(work, model):
    (work / "store").mkdir()
    config = work / "ucm.yaml"
    config.write_text(json.dumps({"ucm_connectors": [{
        "ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": {
            "store_pipeline": "Cache|Posix", "storage_backends": str(work / "store"), "cache_buffer_capacity_gb": 0.25,
            "posix_segment_mb": 16}}], "use_layerwise": False}))
    with contextlib.ExitStack() as stack:
        both = [Server(model, work, role, config) for role in ("kv_producer", "kv_consumer")]
        for server in both:
            stack.callback(server.close)
        for server in both:
            server.wait()
        yield both


@pytest.fixture(scope="module")
def proxy(servers):
    prefiller, decoder = servers
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "toy_proxy_server.py", "--pd-disaggregation", "--host", "localhost", "--port", str(port),
         "--prefiller-host", "127.0.0.1", "--prefiller-port", str(prefiller.port), "--decoder-host", "127.0.0.1",
         "--decoder-port", str(decoder.port)], cwd=ROOT / "ucm" / "pd")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            assert ask(port, "GET", "/healthcheck")[0] == 200
            break
        assert process.poll() is None
        time.sleep(0.05)
    yield port
    process.terminate()
    assert process.wait() == 0


def tokens_of(port: int, length: int, seed: int, stream: bool) -> list[int]:
    status, text = ask(port, "POST", "/v1/completions", {
        "prompt": models.prompt(length, seed), "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
        "detokenize": False, "return_token_ids": True, "stream": stream})
    assert status == 200, text
    if not stream:
        return json.loads(text)["choices"][0]["token_ids"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return [t for e in events for t in json.loads(e)["choices"][0]["token_ids"]]


def test_decoder_computes_less_than_a_block_and_answers_the_same(servers, proxy, expected):
    prefiller, decoder = servers
    for seed, length in enumerate(LENGTHS):
        assert tokens_of(proxy, length, seed, stream=seed % 2 == 1) == expected[seed]
    blocks = [n // BLOCK for n in LENGTHS]
    assert prefiller.hits() == [(n, 0) for n in blocks]
    assert decoder.hits() == [(n, n) for n in blocks]


def test_the_engines_own_pages_come_through(proxy):
    assert ask(proxy, "GET", "/v1/models")[0] == 200
    assert ask(proxy, "GET", "/version")[0] == 200
    status, text = ask(proxy, "POST", "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": -1})
    assert status == 400 and "max_tokens" in text
