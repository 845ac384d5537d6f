#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the start scripts of a deployment: one for each engine, one for each host that starts its engines, one
for the proxy, and the files they read.

    python examples/deployments/generate.py DEPLOYMENT.yaml DIRECTORY

docs/deployments.md explains the keys.  Needs PyYAML, which vLLM brings.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from string import Template

import yaml

TEMPLATES = Path(__file__).parent / "templates"
DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "ascend": "ASCEND_RT_VISIBLE_DEVICES"}
NICS = {"cuda": ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
        "ascend": ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")}
ROLES = {"both": "worker", "prefill": "prefiller", "decode": "decoder"}  # what the proxy calls them
KV_ROLES = {"both": "kv_both", "prefill": "kv_producer", "decode": "kv_consumer"}

# key -> its default; ... : must be given
DEPLOYMENT = {"model": ..., "transfer": "store", "devices_per_host": 8, "flags": {}, "env": {}, "ucm": ...,
              "engines": ..., "proxy": {}, "mooncake": {}}
ENGINES = {"role": ..., "hosts": ..., "on_each_host": 1, "port": 8000, "platform": "cuda", "tensor_parallel": 1,
           "one_data_parallel_group": False, "data_parallel_rpc_port": 13395, "first_device": 0, "kv_port": 20001,
           "nic": None, "flags": {}, "env": {}}
KINDS = {int: "a number, not below 0", bool: "true or false", dict: "keys with values"}
CHOICES = {"role": ROLES, "platform": DEVICES, "transfer": ("store", "mooncake")}


class Wrong(ValueError):
    """What a deployment cannot be; the text names the key, the value and the remedy."""


class Text(Template):
    delimiter = "@"


def checked(given, keys, where):
    """given with the defaults of keys."""
    if not isinstance(given, dict):
        raise Wrong(f"{where}: {given!r}: keys with values are needed")
    for key in given:
        if key not in keys:
            raise Wrong(f"{where}: {key}: no such key; there are {', '.join(keys)}")
    for key, default in keys.items():
        value = given.get(key, default)
        if value is ...:
            raise Wrong(f"{where}: {key} is missing")
        if key in CHOICES and value not in CHOICES[key]:
            raise Wrong(f"{where}: {key}: {value!r}: give one of {', '.join(CHOICES[key])}")
        if type(default) in (int, bool, dict) and type(value) is not type(default) or type(value) is int and value < 0:
            raise Wrong(f"{where}: {key}: {value!r}: give {KINDS.get(type(default), 'another')}")
    return {key: given.get(key, default) for key, default in keys.items()}


def load(path):
    try:
        d = checked(yaml.safe_load(Path(path).read_text()), DEPLOYMENT, path)
    except yaml.YAMLError as e:
        raise Wrong(f"{path}: no YAML: {e}") from None
    if not isinstance(d["engines"], list) or not d["engines"]:
        raise Wrong(f"{path}: engines: {d['engines']!r}: a list of groups of engines is needed")
    d["engines"] = [checked(g, ENGINES, f"{path}: engines") for g in d["engines"]]
    for g in d["engines"]:
        hosts = g["hosts"] if isinstance(g["hosts"], list) else []
        if not hosts or not all(re.fullmatch(r"[\w.:-]+", str(host)) for host in hosts):
            raise Wrong(f"{path}: engines: hosts: {g['hosts']!r}: a list of addresses or names is needed")
    for key in {**d["env"], **{k: v for g in d["engines"] for k, v in g["env"].items()}}:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(key)):
            raise Wrong(f"{path}: env: {key!r} is no name of a variable")
    roles = {g["role"] for g in d["engines"]}
    if len(roles) < len(d["engines"]) or roles not in ({"both"}, {"prefill", "decode"}):
        raise Wrong(f"{path}: engines: roles {[g['role'] for g in d['engines']]}: give one group `both`, or one "
                    "`prefill` and one `decode`")
    if d["transfer"] == "mooncake" and (roles == {"both"} or "master" not in d["mooncake"]):
        raise Wrong(f"{path}: transfer: mooncake: groups prefill and decode are needed, and mooncake: master: HOST:PORT")
    return d


def place(d, where):
    """One dict for each engine: what differs between them."""
    engines, taken = [], {}
    for g in d["engines"]:
        for rank in range(len(g["hosts"]) * g["on_each_host"]):
            host, i = g["hosts"][rank // g["on_each_host"]], rank % g["on_each_host"]
            tp, first = g["tensor_parallel"], g["first_device"] + i * g["tensor_parallel"]
            e = {**g, "name": f"{g['role']}-{rank}", "host": host, "rank": rank, "port": g["port"] + i,
                 "devices": list(range(first, first + tp)), "kv_port": g["kv_port"] + i * tp}
            if first + tp > d["devices_per_host"]:
                raise Wrong(f"{where}: devices_per_host: {d['devices_per_host']}: {e['name']} on {host} would need "
                            f"device {first + tp - 1}; lower on_each_host, tensor_parallel or first_device")
            for what in [f"device {n}" for n in e["devices"]] + [f"port {e['port']}"]:
                owner = taken.setdefault((host, what), e["name"])
                if owner != e["name"]:
                    raise Wrong(f"{where}: {host}: {what} would be {owner}'s and {e['name']}'s; give one of the groups "
                                f"another {'port' if what.startswith('port') else 'first_device'}")
            engines.append(e)
    return engines


def degrees(engines, role):
    """Of a role, as Mooncake's connector wants them."""
    mine = [e for e in engines if e["role"] == role]
    return {"dp_size": len(mine) if mine[0]["one_data_parallel_group"] else 1, "tp_size": mine[0]["tensor_parallel"]}


def kv_transfer(d, e, engines):
    """--kv-transfer-config: through the store, or straight by Mooncake and the store beside it for prompts."""
    role = KV_ROLES[e["role"]]
    ucm = {"kv_connector": "UCMConnector", "kv_role": role if d["transfer"] == "store" else "kv_both",
           "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
           "kv_connector_extra_config": {"UCM_CONFIG_FILE": "@HERE/ucm.yaml"}}
    if d["transfer"] == "store":
        return {**ucm, "kv_load_failure_policy": "recompute"}
    straight = {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": e["kv_port"],
                "kv_connector_extra_config": {r: degrees(engines, r) for r in ("prefill", "decode")}}
    if e["role"] == "decode":
        return straight
    return {"kv_connector": "MultiConnector", "kv_role": role,
            "kv_connector_extra_config": {"connectors": [straight, ucm]}}


def words(flags):
    """[["--a", "1"], ...]; a value true is a flag alone, a dict JSON."""
    for key, value in flags.items():
        if value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            yield [f"--{key}"] + ([] if value is True else text.split() if key.endswith(("hosts", "ports")) else [text])


def command(rows):
    """Each option on its line; @HERE is the directory of the script."""
    lines = [" ".join(shlex.quote(word) for word in row) for row in rows]
    return " \\\n    ".join(lines).replace("@HERE", "'\"$PWD\"'")


def engine_script(d, e, engines):
    env = {DEVICES[e["platform"]]: ",".join(map(str, e["devices"])), **d["env"], **e["env"]}
    env.update({name: e["nic"] for name in NICS[e["platform"]] if e["nic"]})
    if e["platform"] == "ascend" and e["one_data_parallel_group"]:
        env["HCCL_IF_IP"] = e["host"]
    if d["transfer"] == "mooncake":
        env["MOONCAKE_CONFIG_PATH"] = "./mooncake.json"
    flags = {"host": "0.0.0.0", "port": e["port"], "tensor-parallel-size": e["tensor_parallel"]}
    if e["one_data_parallel_group"]:
        size = len(e["hosts"]) * e["on_each_host"]
        flags |= {"data-parallel-size": size, "data-parallel-rank": e["rank"], "data-parallel-address": e["hosts"][0],
                  "data-parallel-rpc-port": e["data_parallel_rpc_port"]}
    flags |= {**d["flags"], **e["flags"], "kv-transfer-config": kv_transfer(d, e, engines)}
    # In double quotes: a value may take up the environment's, as ${PYTHONPATH-}.
    quoted = {key: re.sub(r'(["`\\])', r"\\\1", str(value)) for key, value in env.items()}
    exports = "\n".join(f'export {key}="{value}"' for key, value in quoted.items())
    return {"NAME": e["name"], "HOST": e["host"], "EXPORTS": exports,
            "ARGUMENTS": command([[str(d["model"])], *words(flags)])}


def proxy_script(d, engines):
    flags = {"pd-disaggregation": any(e["role"] != "both" for e in engines), "host": "0.0.0.0", "port": 8000}
    for role, name in ROLES.items():
        mine = [e for e in engines if e["role"] == role]
        if mine:
            flags[f"{name}-hosts"] = " ".join(e["host"] for e in mine)
            flags[f"{name}-ports"] = " ".join(str(e["port"]) for e in mine)
    flags |= {"transfer": "params" if d["transfer"] == "mooncake" else "none", **d["proxy"]}
    return {"ARGUMENTS": command(words(flags))}


def files(d, where):
    """name -> text, of the whole deployment."""
    def script(template, values):
        return Text((TEMPLATES / template).read_text()).substitute(values)
    engines = place(d, where)
    out = {f"{e['name']}.sh": script("engine.sh", engine_script(d, e, engines)) for e in engines}
    for host in dict.fromkeys(e["host"] for e in engines):
        starts = "\n".join(f"./{e['name']}.sh >{e['name']}.log 2>&1 &" for e in engines if e["host"] == host)
        out[f"start-{host}.sh"] = script("host.sh", {"HOST": host, "STARTS": starts})
    out["proxy.sh"] = script("proxy.sh", proxy_script(d, engines))
    out["ucm.yaml"] = yaml.safe_dump(d["ucm"], sort_keys=False)
    if d["transfer"] == "mooncake":
        options = dict(d["mooncake"])
        master = options.pop("master")
        flags = {"port": master.rpartition(":")[2], **options.pop("flags", {})}
        out["mooncake-master.sh"] = script("mooncake-master.sh", {
            "HOST": master.rpartition(":")[0],
            "ARGUMENTS": command(words(flags))})
        out["mooncake.json"] = json.dumps({
            "metadata_server": "P2PHANDSHAKE", "protocol": "ascend", "device_name": "", "master_server_address": master,
            "global_segment_size": "1GB", **options}, indent=4) + "\n"
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployment", metavar="DEPLOYMENT.yaml")
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    o = parser.parse_args()
    try:
        written = files(load(o.deployment), o.deployment)
        o.directory.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            path = o.directory / name
            path.write_text(text)
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
    except (OSError, ValueError) as e:
        sys.exit(f"generate: {e}")
    print("\n".join(written))


if __name__ == "__main__":
    main()
