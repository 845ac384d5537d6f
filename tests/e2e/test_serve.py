# SPDX-License-Identifier: Apache-2.0
"""`vllm serve`, its processes and all, as the documents start it.  Slow to start, so few times."""

from __future__ import annotations

from engine import UCM
from models import prompt
from server import Server
from support import BLOCK
from test_stats import YAML, assert_dashboard_shows, samples


def test_metrics_of_a_real_server(model, reference, tmp_path):
    """Beside another connector too (MultiConnector), where a connector that vLLM cannot find by name, or that
    has no metrics, ends the server with its first statistics."""
    (tmp_path / "store").mkdir()
    config = {"storage_backends": str(tmp_path / "store"), "cache_buffer_capacity_gb": 0.25, "posix_segment_mb": 16,
              "metrics_config_path": str(YAML), "model_id": str(tmp_path)}
    p = prompt(7 * BLOCK + 50, 1)
    transfer = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "connectors": [{**UCM, "kv_role": "kv_both", "kv_connector_extra_config": config}]}}
    with Server(model(), tmp_path / "serve.log", transfer, "--skip-tokenizer-init", "--max-model-len", "8192") as server:
        server.wait()
        for _ in range(2):
            assert [server.complete(p).tokens] == reference([p])
        assert server.hits() == [(7, 0, 0), (7, 0, 7)]

        def stored():
            server.complete(prompt(40, 2))  # statistics come with steps
            m = samples(server.ask("GET", "/metrics")[1])
            return m if m.get("ucm:disk_writes_total") == 7 and m.get("ucm:save_stored_duration_count") == 1 else None

        m = server.wait(stored)
        assert m["ucm:load_bytes_total"] == m["ucm:dump_bytes_total"] == 7 << 19
        assert m["ucm:hit_dram_tokens_total"] == 7 * BLOCK
        assert_dashboard_shows(m)
        server.wait(lambda: server.lines(r"KV Transfer metrics: .*blocks saved.: 7"))
