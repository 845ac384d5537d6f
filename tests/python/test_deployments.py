# SPDX-License-Identifier: Apache-2.0
"""The generated start scripts: what they run, whether those programs take it, and what is refused."""

import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the engine")
from ucm.config import from_extra_config  # noqa: E402

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "deployments"
DEPLOYMENTS = sorted(p.stem for p in HERE.glob("*.yaml"))

spec = importlib.util.spec_from_file_location("generate", HERE / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

RECORD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)]) + "\\n")
"""


def written(name, directory):
    subprocess.run([sys.executable, HERE / "generate.py", HERE / f"{name}.yaml", directory], check=True,
                   stdout=subprocess.DEVNULL)
    return directory


def programs(directory, text=RECORD):
    """A PATH on which the programs that scripts start only say what they were given."""
    directory.mkdir()
    for name in ("vllm", "ucm-proxy", "mooncake_master"):
        (directory / name).write_text(text.format(python=sys.executable))
        (directory / name).chmod(0o755)
    return f"{directory}:/usr/bin:/bin"


def started(out, tmp_path):
    """{script: [(program, arguments, environment)]} of the scripts that people start."""
    env = {"PATH": programs(tmp_path / "bin")}
    runs = {}
    for script in sorted(p for p in out.glob("*.sh") if not p.name.startswith(("prefill", "decode", "both"))):
        record = tmp_path / f"record-{script.stem}"
        subprocess.run([script], check=True, cwd="/", env={**env, "RECORD": str(record)}, timeout=60)
        runs[script.stem] = [json.loads(line) for line in record.read_text().splitlines()]
    return runs


def options(words):
    """{"port": "7800", "enforce-eager": ""} of a command line."""
    out, key = {}, None
    for word in words:
        if word.startswith("--"):
            key = word[2:]
            out[key] = ""
        elif key:
            out[key] = f"{out[key]} {word}".strip()
    return out


def ucm_of(kv):
    """UCMConnector's part of a --kv-transfer-config, if there is one."""
    parts = [kv, *kv.get("kv_connector_extra_config", {}).get("connectors", [])]
    return next((p for p in parts if p["kv_connector"] == "UCMConnector"), None)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_is_started(name, tmp_path):
    out = written(name, tmp_path / "out")
    for script in out.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
    runs = started(out, tmp_path)
    addresses, with_ucm = set(), 0
    for host, engines in [(k.removeprefix("start-"), v) for k, v in runs.items() if k.startswith("start-")]:
        devices = []
        for program, words, env in engines:
            given = options(words)
            assert program == "vllm" and words[0] == "serve"
            addresses.add((host, given["port"]))
            mine = (env.get("CUDA_VISIBLE_DEVICES") or env["ASCEND_RT_VISIBLE_DEVICES"]).split(",")
            assert len(mine) == int(given["tensor-parallel-size"])
            devices += mine
            ucm = ucm_of(json.loads(given["kv-transfer-config"]))
            if ucm:
                with_ucm += 1
                assert from_extra_config(ucm["kv_connector_extra_config"]).get("store_pipeline") == "Cache|Posix"
        assert len(devices) == len(set(devices))
    assert with_ucm
    (program, words, _), = runs["proxy"]
    given = options(words)
    named = [(h, p) for role in ("worker", "prefiller", "decoder")
             for h, p in zip(given.get(f"{role}-hosts", "").split(), given.get(f"{role}-ports", "").split(), strict=True)]
    assert program == "ucm-proxy" and len(named) == len(addresses) and set(named) == addresses


def test_the_large_one_is_the_recipe(tmp_path):
    """What it says of ranks, ports and devices, on each of the eight hosts."""
    runs = started(written("large-ep", tmp_path / "out"), tmp_path)
    seen = {}
    for n in range(1, 9):
        for _, words, env in runs[f"start-192.168.10.{n}"]:
            o = options(words)
            kv = json.loads(o["kv-transfer-config"])
            straight = kv.get("kv_connector_extra_config", {}).get("connectors", [kv])[0]
            assert straight["kv_connector"] == "MooncakeConnectorV1"
            assert straight["kv_connector_extra_config"] == {
                "prefill": {"dp_size": 4, "tp_size": 8}, "decode": {"dp_size": 8, "tp_size": 4}}
            assert env["HCCL_IF_IP"] == f"192.168.10.{n}" and env["MOONCAKE_CONFIG_PATH"] == "./mooncake.json"
            assert (kv["kv_role"], o["data-parallel-address"], o["data-parallel-rpc-port"]) == (
                ("kv_producer", "192.168.10.1", "13395") if n < 5 else ("kv_consumer", "192.168.10.5", "13395"))
            assert "enable-expert-parallel" in o and o["data-parallel-size"] == ("4" if n < 5 else "8")
            seen[n, o["data-parallel-rank"]] = (o["port"], straight["kv_port"], env["ASCEND_RT_VISIBLE_DEVICES"])
    assert seen == {
        **{(n, str(n - 1)): ("9000", 20001, "0,1,2,3,4,5,6,7") for n in range(1, 5)},
        **{(n, str(2 * (n - 5) + i)): (str(9000 + i), 20001 + 4 * i, ("0,1,2,3", "4,5,6,7")[i])
           for n in range(5, 9) for i in (0, 1)}}
    assert runs["mooncake-master"][0][1] == [
        "--port", "50088", "--eviction_high_watermark_ratio", "0.9", "--eviction_ratio", "0.1", "--default_kv_lease_ttl", "11000"]
    assert json.loads((tmp_path / "out/mooncake.json").read_text()) == {
        "metadata_server": "P2PHANDSHAKE", "protocol": "ascend", "device_name": "",
        "master_server_address": "192.168.10.1:50088", "global_segment_size": "1GB"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_proxy_takes_its_options(name, tmp_path):
    found = shutil.which("ucm-proxy", path=str(Path(sys.executable).parent)) or shutil.which(ROOT / "build/tools/ucm-proxy")
    if not found:
        pytest.skip("ucm-proxy is neither beside this Python nor in build/")
    words = started(written(name, tmp_path / "out"), tmp_path)["proxy"][0][1]
    done = subprocess.run([found, *words, "--the-end"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "the-end" in done.stderr  # the first that it does not take


def test_vllm_takes_its_options(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser())
    for name in DEPLOYMENTS:
        runs = started(written(name, tmp_path / name / "out"), tmp_path / name)
        for _, words, _ in (run for key, engines in runs.items() if key.startswith("start-") for run in engines):
            o = parser.parse_args(words[1:])
            assert str(o.tensor_parallel_size) == options(words)["tensor-parallel-size"]
            assert o.kv_transfer_config.kv_role == json.loads(options(words)["kv-transfer-config"])["kv_role"]


def test_ending_a_host_ends_its_engines(tmp_path):
    """The engines hold a pipe open; its end is theirs."""
    out = written("prefix-cache", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    text = ("#!{python}\nimport os, signal\nf = open(os.environ['RECORD'], 'w')\nf.write('up\\n')\nf.flush()\n"
            "signal.pause()\n")
    env = {"PATH": programs(tmp_path / "bin", text), "RECORD": str(tmp_path / "pipe")}
    host = subprocess.Popen([out / "start-127.0.0.1.sh"], env=env, start_new_session=True)
    deadline = threading.Timer(60, os.killpg, (host.pid, signal.SIGKILL))
    deadline.start()
    with open(tmp_path / "pipe") as pipe:
        assert [pipe.readline(), pipe.readline()] == ["up\n"] * 2
        host.terminate()
        assert pipe.read() == ""
    assert host.wait(60) == 1
    assert deadline.is_alive()
    deadline.cancel()


def test_values_are_quoted(tmp_path):
    d = yaml.safe_load((HERE / "1p1d.yaml").read_text())
    d |= {"model": "/a b/$(touch x)'", "env": {"A": 'x"`touch y`\\'}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(d))
    files = generate.files(generate.load(tmp_path / "d.yaml"), "d.yaml")
    (tmp_path / "s.sh").write_text(files["prefill-0.sh"])
    record = tmp_path / "record"
    subprocess.run(["bash", tmp_path / "s.sh"], check=True, env={"PATH": programs(tmp_path / "bin"), "RECORD": str(record)})
    _, words, env = json.loads(record.read_text())
    assert words[1] == d["model"] and env["A"] == d["env"]["A"]
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(modell="x"), "modell: no such key"),
    (lambda d: d.pop("model"), "model is missing"),
    (lambda d: d.update(transfer="nfs"), "transfer: 'nfs': give one of store, mooncake"),
    (lambda d: d.update(transfer="mooncake"), "master: HOST:PORT"),
    (lambda d: d["engines"][0].update(tensor_parallel="two"), "tensor_parallel: 'two': give a number"),
    (lambda d: d["engines"][0].update(tensor_parallel=16), "devices_per_host: 8: prefill-0 on 127.0.0.1 would need device 15"),
    (lambda d: d["engines"][1].update(first_device=0), "device 0 would be prefill-0's and decode-0's"),
    (lambda d: d["engines"][1].update(port=7800), "port 7800 would be prefill-0's and decode-0's"),
    (lambda d: d["engines"][0].update(hosts=[]), "hosts: []"),
    (lambda d: d["engines"][0].update(hosts=["a/../b"]), "hosts: ['a/../b']"),
    (lambda d: d["engines"][0].update(env={"A B": 1}), "'A B' is no name of a variable"),
    (lambda d: d["engines"].pop(), "one `prefill` and one `decode`"),
    (lambda d: d.update(engines=3), "engines: 3"),
])
def test_what_is_refused(change, words, tmp_path):
    d = copy.deepcopy(yaml.safe_load((HERE / "1p1d.yaml").read_text()))
    change(d)
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(d))
    done = subprocess.run([sys.executable, HERE / "generate.py", tmp_path / "d.yaml", tmp_path / "out"], capture_output=True,
                          text=True)
    assert done.returncode == 1 and words in done.stderr and not (tmp_path / "out").exists()
