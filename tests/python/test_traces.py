# SPDX-License-Identifier: Apache-2.0
"""Traces of requests: what is written, how much of it, and what is made of it."""

import json
import os
import subprocess
import sys
import threading

import pytest

from ucm import traces
from ucm.traces import Recorder, convert, directory_of, read


def key(i):
    return bytes([i]) * 16


def recorder(path):
    return Recorder(path, 128)


def test_what_a_line_says(tmp_path):
    r = recorder(tmp_path / "new")
    r.record(1000.5, 300, 7, key(1) + key(2))
    r.close()
    assert r.path.parent == tmp_path / "new" and os.stat(r.path.parent).st_mode & 0o77 == 0
    assert json.loads(r.path.read_text()) == {
        "timestamp": 1000500, "input_length": 300, "output_length": 7, "block_tokens": 128,
        "hash_ids": ["01" * 16, "02" * 16]}


def test_files_are_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("UCM_LOG_MAX_FILES", "3")
    monkeypatch.setenv("UCM_LOG_MAX_SIZE", "1")
    r = recorder(tmp_path)
    keys = os.urandom(16 * 8000)  # some 280 kB a line
    for i in range(20):
        r.record(i, i, 0, keys)
    r.close()
    sizes = [p.stat().st_size for p in tmp_path.glob("*.jsonl*")]
    assert len(sizes) == 3 and max(sizes) <= 1 << 20
    assert [q["input_length"] for q in read([str(tmp_path)])] == list(range(12, 20))


def test_each_process_has_its_file_and_the_next_goes_on_in_it(tmp_path):
    first, second = recorder(tmp_path), recorder(tmp_path)
    assert first.path != second.path
    first.close()
    third = recorder(tmp_path)
    assert third.path == first.path
    second.close(), third.close()


def test_a_directory_that_does_not_take_lines_costs_no_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(traces, "CLOSE_S", 0.01)
    r = recorder(tmp_path)
    answers = threading.Event()
    r._file.emit = lambda record: answers.wait()
    for _ in range(2000):
        r.record(0, 0, 0, b"")
    assert caplog.text.count("some are lost") == 1
    assert 2000 - traces.WAITING - 1 <= r.lost() <= 2000 - traces.WAITING and r.lost() == 0
    r.close()
    answers.set()


def test_where_they_go(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for variable in ("UCM_LOG_PATH", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert str(directory_of("")) == "/home/me/.local/state/ucm"
    monkeypatch.setenv("UCM_LOG_PATH", "/logs")
    assert str(directory_of("")) == "/logs"
    assert str(directory_of("/mine")) == "/mine"


REQUESTS = [  # as two engines wrote them
    {"timestamp": 5000, "input_length": 300, "output_length": 1, "block_tokens": 128, "hash_ids": ["a", "b"]},
    {"timestamp": 7000, "input_length": 512, "output_length": 2, "block_tokens": 128, "hash_ids": ["a", "b", "c", "d"]},
    {"timestamp": 6000, "input_length": 600, "output_length": 3, "block_tokens": 128, "hash_ids": ["a", "b", "c", "e"]},
]


@pytest.mark.parametrize("block_tokens, ids", [
    (0, [[0, 1, 2], [0, 1, 3, 4, 5], [0, 1, 3, 6]]),
    (256, [[0, 1], [0, 2, 3], [0, 4]]),
    (512, [[0], [1, 2], [3]]),
])
def test_mooncakes_format(tmp_path, block_tokens, ids):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, REQUESTS[:2])))
    (tmp_path / "y.jsonl.1").write_text(json.dumps(REQUESTS[2]))
    out = list(convert(read([str(tmp_path)]), block_tokens))
    assert [r["hash_ids"] for r in out] == ids
    assert [(r["timestamp"], r["input_length"], r["output_length"]) for r in out] == [
        (0, 300, 1), (1000, 600, 3), (2000, 512, 2)]


def test_the_command(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)))

    def run(*args):
        return subprocess.run([sys.executable, "-m", "ucm.traces", *args], capture_output=True, text=True, cwd="/")

    assert len(run(str(tmp_path)).stdout.splitlines()) == 3
    assert "no multiple of the 128 tokens" in run("--block-tokens", "200", str(tmp_path)).stderr
    (tmp_path / "z.jsonl").write_text("{}\n")
    assert "z.jsonl, line 1: not a request" in run(str(tmp_path)).stderr
