# SPDX-License-Identifier: Apache-2.0
"""The guides' mooncake_master, by the script and the mooncake.json that examples/deployments writes: what one client of
the real Mooncake stores there another gets.  `make test-pd`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from server import HERE, Program, free_port

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "examples" / "deployments"
CLIENT = """
import json, sys
from mooncake.store import MooncakeDistributedStore
c = json.load(open(sys.argv[1]))
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", c["metadata_server"], 64 << 20, 16 << 20, c["protocol"], c["device_name"],
                   c["master_server_address"]) == 0
if sys.argv[2] == "put":
    assert store.put("prompt", b"kv" * 100000) == 0
else:
    assert store.get("prompt") == b"kv" * 100000
print("done", flush=True)
sys.stdin.read()
store.close()
"""


@pytest.fixture
def deployment(tmp_path) -> tuple[Path, int]:
    """The directory of its scripts, and the port at which the master says how it is."""
    port = free_port()
    given = yaml.safe_load((DEPLOYMENTS / "large-ep.yaml").read_text())
    given["mooncake"] |= {"master": f"{HERE}:{free_port()}", "protocol": "tcp"}
    given["mooncake"]["flags"] |= {"rpc_address": HERE, "metrics_host": HERE, "metrics_port": port}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(given))
    subprocess.run([sys.executable, DEPLOYMENTS / "generate.py", tmp_path / "here.yaml", tmp_path / "out"], check=True,
                   stdout=subprocess.DEVNULL)
    return tmp_path / "out", port


def test_the_guides_master_serves(deployment, tmp_path):
    out, port = deployment
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [out / "mooncake-master.sh"]
    with Program(command, tmp_path / "master.log", port, "/health", env={**os.environ, "PATH": path}) as master:
        master.wait()
        assert json.loads(master.ask("GET", "/health")[1])["service_ready"]
        with client(out, "put", tmp_path) as one:
            assert one.stdout.readline() == "done\n", (tmp_path / "put.log").read_text()
            with client(out, "get", tmp_path) as other:
                assert other.communicate()[0] == "done\n", (tmp_path / "get.log").read_text()
            one.communicate()


def client(out: Path, what: str, tmp_path: Path) -> subprocess.Popen:
    with open(tmp_path / f"{what}.log", "w") as log:
        return subprocess.Popen([sys.executable, "-c", CLIENT, out / "mooncake.json", what], text=True, stderr=log,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                env={**os.environ, "MC_TCP_BIND_ADDRESS": HERE})
