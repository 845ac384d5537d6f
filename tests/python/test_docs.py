# SPDX-License-Identifier: Apache-2.0
"""What docs/vllm.md and docs/troubleshooting.md show works as it stands there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Engine, keys, numbers

import ucm
from ucm.config import from_extra_config

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("vllm", "troubleshooting")}


def fenced(kind):
    return [(name, text) for name, page in PAGES.items() for text in re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)]


COMMANDS = [line for _, text in fenced("sh") for line in text.splitlines()]


@pytest.mark.parametrize("name, text", fenced("yaml"))
def test_configurations(name, text, tmp_path):
    path = tmp_path / "ucm.yaml"
    path.write_text(text)
    conf = from_extra_config({"UCM_CONFIG_FILE": str(path)})
    for key, value in re.findall(r"^ *(\w+): \"?([^\"\n]+?)\"?$", text, re.M):
        if value.isdecimal():
            assert float(conf.get(key)) == float(value)


def tool():
    found = shutil.which("ucm", path=str(Path(sys.executable).parent)) or shutil.which(str(ROOT / "build/tools/ucm"))
    if not found:
        pytest.skip("the tool is neither beside this Python nor in build/")
    return found


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ucm ")])
def test_commands_of_the_tool(command, options, tmp_path):
    engine = Engine()
    with ucm.Store(options) as store:
        store.dump(engine.map(store), keys("a"), numbers(0)).wait("stored")
    if shutil.which("fio") is None and " bench " in command:
        command += " --no-fio"
    done = subprocess.run([tool(), *command.replace("DIR", str(tmp_path)).split()[1:]], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_traces_to_replay(tmp_path):
    convert, replay = [c.split() for c in COMMANDS if "trace" in c]
    assert convert[:3] == ["python", "-m", "ucm.traces"] and convert[-1] == replay[-1]
    traces, out = tmp_path / "TRACES", tmp_path / "trace.jsonl"
    traces.mkdir()
    (traces / "trace-host-0.jsonl").write_text("".join(json.dumps(
        {"timestamp": 1000 * i, "input_length": 256, "output_length": 1, "block_tokens": 128, "hash_ids": ["a", f"{i % 2}"]}
    ) + "\n" for i in range(10)))
    with open(out, "w") as f:
        subprocess.run([sys.executable, "-m", "ucm.traces", str(traces)], stdout=f, check=True, cwd="/")
    program = ROOT / replay[0]
    if not program.exists():
        pytest.skip("bench/replay is not built")
    done = subprocess.run([program, *replay[1:-1], out], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "85.00" in done.stdout  # 17 of 20 blocks


def test_every_option_with_a_value_exists():
    conf = ucm.Conf()
    given = [(key, value) for page in PAGES.values() for key, value in re.findall(r"`([a-z_]+): ([^`\n]+)`", page)
             if key not in ("total_blocks_num", "request_id", "ucm")]
    assert len(given) > 8
    for key, value in given:
        conf.set(key, value)
