# SPDX-License-Identifier: Apache-2.0
"""`vllm serve`, its three processes and all, as the documents start it.  Slow to start, so once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from models import prompt
from support import BLOCK, HIT_LINE
from test_stats import UCM, YAML, assert_dashboard_shows, samples

START_S = 600
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "VLLM_LOGGING_COLOR": "0", "VLLM_LOG_STATS_INTERVAL": "1"}


class Server:
    def __init__(self, process: subprocess.Popen, log: Path, port: int, model: Path):
        self.process, self.log, self.model = process, log, str(model)
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, body: dict | None = None) -> bytes:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return answer.read()

    def ask(self, tokens: list[int]) -> list[int]:
        answer = self.get("/v1/completions", {"model": self.model, "prompt": tokens, "max_tokens": 8, "temperature": 0,
                                              "ignore_eos": True, "return_token_ids": True})
        return json.loads(answer)["choices"][0]["token_ids"]

    def metrics(self) -> dict[str, float]:
        return samples(self.get("/metrics").decode())

    def wait(self, condition):
        """What another process has is not to be waited for but by asking; the server gets the time in between."""
        end = time.monotonic() + START_S
        while not (value := condition()):
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.2)
        return value

    def lines(self, pattern: str) -> list:
        return re.findall(pattern, self.log.read_text())


@pytest.fixture
def serve(model, tmp_path):
    @contextlib.contextmanager
    def start(transfer: dict):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log = tmp_path / "serve.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("vllm"), "serve", model(), "--host", "127.0.0.1", "--port", str(port),
                 "--max-model-len", "8192", "--block_size", "128", "--enforce-eager", "--no-enable-prefix-caching",
                 "--dtype", "float32", "--skip-tokenizer-init", "--kv-transfer-config", json.dumps(transfer)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path,
                env={**os.environ, **SETTINGS, "TMPDIR": str(tmp_path)})
        server = Server(process, log, port, model())
        try:
            server.wait(lambda: "Application startup complete" in log.read_text())
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return start


def test_metrics_of_a_real_server(serve, reference, tmp_path):
    """Beside another connector too (MultiConnector), where a connector that vLLM cannot find by name, or that
    has no metrics, ends the server with its first statistics."""
    (tmp_path / "store").mkdir()
    config = {"storage_backends": str(tmp_path / "store"), "cache_buffer_capacity_gb": 0.25, "posix_segment_mb": 16,
              "metrics_config_path": str(YAML), "model_id": str(tmp_path)}
    p = prompt(7 * BLOCK + 50, 1)
    with serve({"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
            "connectors": [{**UCM, "kv_role": "kv_both", "kv_connector_extra_config": config}]}}) as server:
        for _ in range(2):
            assert [server.ask(p)] == reference([p])
        assert [tuple(map(int, m)) for m in server.lines(HIT_LINE.pattern)] == [(7, 0, 0), (7, 0, 7)]

        def stored():
            server.ask(prompt(40, 2))  # statistics come with steps
            m = server.metrics()
            return m if m.get("ucm:disk_writes_total") == 7 and m.get("ucm:save_stored_duration_count") == 1 else None

        m = server.wait(stored)
        assert m["ucm:load_bytes_total"] == m["ucm:dump_bytes_total"] == 7 << 19
        assert m["ucm:hit_dram_tokens_total"] == 7 * BLOCK
        assert_dashboard_shows(m)
        server.wait(lambda: server.lines(r"KV Transfer metrics: .*blocks saved.: 7"))
