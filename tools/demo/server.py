# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` and ucm-proxy, started as the documents have it, and a client for both.

Needs nothing but the standard library.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import SETTINGS

HERE = "127.0.0.1"
START_S, ANSWER_S, END_S = 600, 600, 60  # how long to wait for each, in seconds
HIT_LINE = re.compile(r"total_blocks_num: (\d+), hit hbm: (\d+), hit external: (\d+)")
CPU = ("--dtype", "float32", "--enforce-eager", "--block-size", "128", "--no-enable-prefix-caching")


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HERE, 0))
        return s.getsockname()[1]


def ask(port: int, method: str, target: str, body: dict | None = None,
        headers: dict[str, str] = {}) -> tuple[int, str]:
    """Status and body of the answer."""
    with contextlib.closing(http.client.HTTPConnection(HERE, port, timeout=ANSWER_S)) as connection:
        connection.request(method, target, body and json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()


@dataclass
class Answer:
    tokens: list[int]
    cached: int | None  # tokens of the prompt that were not computed, where the server says so


class Failed(RuntimeError):
    """The server said so, or broke off."""


def complete(port: int, model: Path, prompt: list[int], tokens: int = 8, stream: bool = False,
             rank: int | None = None) -> Answer:
    """The greedy answer to a prompt of token ids, or Failed.  rank: which engine of data parallelism is to give it."""
    try:
        status, text = ask(port, "POST", "/v1/completions", {
            "model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {})},
            {} if rank is None else {"X-data-parallel-rank": str(rank)})
    except (OSError, http.client.HTTPException) as e:
        raise Failed(f"{type(e).__name__}") from e
    if status != 200:
        raise Failed(f"{status}: {text}")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line] if stream else [text]
    parts = [json.loads(e) for e in events if e != "[DONE]"]
    if any("error" in part for part in parts):
        raise Failed(f"an error event: {events[-1]}")
    if stream and events[-1] != "[DONE]":
        raise RuntimeError(f"the stream ended as if it were whole: {text[-500:]}")
    usage = next(p["usage"] for p in reversed(parts) if p.get("usage"))
    return Answer([t for p in parts for c in p["choices"] for t in c["token_ids"]],
                  (usage.get("prompt_tokens_details") or {}).get("cached_tokens"))


class Program:
    """One that serves HTTP on a port of this machine.  Its output goes to `log`."""

    def __init__(self, command: list[Any], log: Path, port: int, up: str, **options: Any):
        self.log, self.port, self._up = log, port, up
        with open(log, "ab") as output:
            self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=output, start_new_session=True, **options)

    def wait(self, condition: Any = None) -> Any:
        """Until it serves; or until something that only asking can tell."""
        end = time.monotonic() + START_S
        while not (value := condition() if condition else self._serves()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.log}: {self.log.read_text(errors='replace')[-5000:]}")
            time.sleep(0.2)
        return value

    def _serves(self) -> bool:
        try:
            return ask(self.port, "GET", self._up)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(self, method: str, target: str, body: dict | None = None) -> tuple[int, str]:
        return ask(self.port, method, target, body)

    def counter(self, name: str) -> float:
        """Of /metrics, all labels together."""
        text = self.ask("GET", "/metrics")[1]
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def lines(self, pattern: str) -> list:
        return re.findall(pattern, self.log.read_text(errors="replace"))

    def stop(self) -> int:
        """In good order, if it is willing."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.close()
        return self.process.returncode

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Server(Program):
    """vllm serve with a KV connector; `options` are more of its arguments."""

    def __init__(self, model: Path, log: Path, transfer: dict, *options: Any,
                 environment: dict[str, str] | None = None):
        self.model, port = model, free_port()
        work = log.parent
        super().__init__(
            [Path(sys.executable).with_name("vllm"), "serve", model, "--host", HERE, "--port", port, *CPU, *options,
             "--kv-transfer-config", json.dumps(transfer)], log, port, "/health", cwd=work,
            env={**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_HOST_IP": HERE,
                 "VLLM_LOG_STATS_INTERVAL": "1", "TMPDIR": str(work), **(environment or {})})

    def complete(self, prompt: list[int], tokens: int = 8, stream: bool = False) -> Answer:
        return complete(self.port, self.model, prompt, tokens, stream)

    def hits(self) -> list[tuple[int, int, int]]:
        """Of each request so far: full blocks, those found in the engine, those found in ucm."""
        return [tuple(map(int, m)) for m in self.lines(HIT_LINE.pattern)]


class Proxy(Program):
    """ucm-proxy between prefillers and decoders."""

    def __init__(self, log: Path, prefillers: list[Server], decoders: list[Server], command: list[Any]):
        port = free_port()
        sides = [part for side, servers in (("prefiller", prefillers), ("decoder", decoders)) for part in (
            f"--{side}-hosts", *[HERE] * len(servers), f"--{side}-ports", *[s.port for s in servers])]
        super().__init__([*command, "--pd-disaggregation", "--host", "localhost", "--port", port, *sides], log, port,
                         "/healthcheck")
