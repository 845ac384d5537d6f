# SPDX-License-Identifier: Apache-2.0
"""vLLM's MooncakeConnector for engines on the CPU of this machine.

All of it is vLLM's but for three things: it asks for the number of the current accelerator, which there is none;
its bootstrap server listens on every address; and its statistics, below MultiConnector, end vLLM 0.32's server.
"""

from __future__ import annotations

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector as vllms

torch.accelerator.current_device_index = lambda: 0
_bootstrap_server = vllms.MooncakeBootstrapServer
vllms.MooncakeBootstrapServer = lambda host, port: _bootstrap_server("127.0.0.1", port)


class MooncakeConnector(vllms.MooncakeConnector):
    def get_kv_connector_stats(self) -> None:
        return None
