# SPDX-License-Identifier: Apache-2.0
"""Straight from prefiller to decoder, by the real Mooncake and the real NIXL, with ucm beside them as the
prefiller's prefix cache: MultiConnector [the transfer, UCMConnector].  Slow: `make test-pd`."""

from __future__ import annotations

import os
from pathlib import Path

import models
import pytest
from engine import UCM
from pd import BLOCK, OPTIONS, PROXY, TOKENS
from server import HERE, Proxy, Server, complete, free_port

LENGTHS = (500, 1300)
MODULES = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
TRANSFERS = {  # name: the connector, the engines' environment, the variable that names a port, what the proxy is told
    "mooncake": ({"kv_connector": "MooncakeConnector", "kv_connector_module_path": "mooncake_on_cpu",
                  "kv_connector_extra_config": {"mooncake_protocol": "tcp", "num_workers": 2}},
                 {"MC_TCP_BIND_ADDRESS": HERE, "PYTHONPATH": MODULES},
                 "VLLM_MOONCAKE_BOOTSTRAP_PORT", ["--transfer", "mooncake", "--prefiller-bootstrap-ports"]),
    "nixl": ({"kv_connector": "NixlConnector", "kv_buffer_device": "cpu",
              "kv_connector_extra_config": {"backends": ["UCX"]}},
             {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_HOST": HERE},
             "VLLM_NIXL_SIDE_CHANNEL_PORT", None),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_prompts_go_straight_and_are_kept(name, work, model, reference, tmp_path):
    connector, environment, port_variable, bootstrap = TRANSFERS[name]
    (tmp_path / "store").mkdir()
    ucm = {**UCM, "kv_role": "kv_both", "kv_connector_extra_config": {
        "storage_backends": str(tmp_path / "store"), "model_id": str(tmp_path), "cache_buffer_capacity_gb": 0.25,
        "posix_segment_mb": 16}}
    both = {"kv_connector": "MultiConnector", "kv_role": "kv_producer", "kv_connector_extra_config": {
        "connectors": [{**connector, "kv_role": "kv_producer"}, ucm]}}
    ports = [str(free_port()) for _ in range(2)]
    prefiller, decoder = (
        Server(model, tmp_path / f"{side}.log", transfer, *OPTIONS, environment={**environment, port_variable: port})
        for side, transfer, port in zip(("prefill", "decode"), (both, {**connector, "kv_role": "kv_consumer"}), ports))
    with prefiller, decoder:
        prefiller.wait()
        decoder.wait()
        told = [*bootstrap, ports[0]] if bootstrap else []
        with Proxy(tmp_path / "proxy.log", [prefiller], [decoder], [*PROXY, *told]) as proxy:
            proxy.wait()
            prompts = [models.prompt(n, 900 + seed) for seed, n in enumerate(LENGTHS)]
            expected = reference(prompts)
            for _ in range(2):
                assert [complete(proxy.port, model, p, TOKENS).tokens for p in prompts] == expected
        blocks = [n // BLOCK for n in LENGTHS]
        assert prefiller.hits() == [(n, 0, 0) for n in blocks] + [(n, 0, n) for n in blocks]
        # All of each prompt, both times; vLLM computes its last token, or block, itself.
        decoder.wait(lambda: decoder.counter("vllm:external_prefix_cache_hits_total") >= 2 * (sum(LENGTHS) - 2 * BLOCK))
