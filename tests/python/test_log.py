# SPDX-License-Identifier: Apache-2.0
import logging
import os
import re
import subprocess
import sys
import threading

import pytest

import ucm


class Lines:
    """Collects log lines; wait(text) waits for one that holds text."""

    def __init__(self):
        self.lines, self.more = [], threading.Condition()

    def __call__(self, level, line):
        with self.more:
            self.lines.append((level, line))
            self.more.notify_all()

    def wait(self, text):
        with self.more:
            assert self.more.wait_for(lambda: any(text in line for _, line in self.lines), 30), self.lines
            return next(entry for entry in self.lines if text in entry[1])


class Handler(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.out = lines

    def emit(self, record):
        self.out(record.levelno, record.getMessage())


@pytest.fixture
def log_to():
    before = ucm._log._sink, ucm._log._level
    yield ucm.log_to
    ucm.log_to(*before)


def say():
    """Makes the core log a warning: an obsolete option."""
    ucm.Conf({"posix_gc_enable": True})


def test_lines_arrive_in_logging():
    lines = Lines()
    handler = Handler(lines)
    logging.getLogger("ucm").addHandler(handler)
    try:
        say()
        assert lines.wait("posix_gc_enable")[0] == logging.WARNING
    finally:
        logging.getLogger("ucm").removeHandler(handler)


def test_lines_go_to_a_callable(log_to):
    lines = Lines()
    log_to(lines, ucm.INFO)
    say()
    assert lines.wait("posix_gc_enable")[0] == ucm.WARN


def test_the_sink_may_use_ucm_and_fail(log_to, capfd):
    """It runs outside the core: what the core forbids its own sink is allowed here."""
    lines = Lines()

    def sink(level, line):
        lines(level, line)
        ucm.Store({"store_pipeline": "Fake", "block_size": 8}).close()
        raise RuntimeError("as handlers do")

    log_to(sink)
    say()
    lines.wait("posix_gc_enable")
    lines.lines.clear()
    say()
    lines.wait("posix_gc_enable")
    assert "RuntimeError: as handlers do" in capfd.readouterr().err


def test_level_holds_lines_back(log_to):
    lines = Lines()
    log_to(lines, "error")
    say()
    log_to(lines, "warn")
    ucm.Conf({"posix_gc_concurrency": 1})
    lines.wait("posix_gc_concurrency")
    assert not any("posix_gc_enable" in line for _, line in lines.lines)


@pytest.mark.parametrize("bad", [("x", 1), (print, "loud"), (print, 4), (print, None)])
def test_wrong_arguments(bad):
    with pytest.raises((TypeError, ValueError)):
        ucm.log_to(*bad)


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **env}, cwd="/"
    )


def test_none_is_standard_error():
    r = run("import ucm; ucm.log_to(None, 1); ucm.Conf({'posix_gc_enable': True})")
    assert r.returncode == 0 and "posix_gc_enable" in r.stderr


def test_the_last_lines_before_exit_arrive():
    r = run("import logging; logging.basicConfig(); import ucm; ucm.Conf({'posix_gc_enable': True})")
    assert r.returncode == 0 and "WARNING:ucm:" in r.stderr and "posix_gc_enable" in r.stderr


def test_level_from_the_environment():
    code = "import logging; logging.basicConfig(); import ucm; ucm.Conf({'posix_gc_enable': True})"
    assert run(code, UC_LOGGER_LEVEL="error").stderr == ""
    assert "UC_LOGGER_LEVEL" in run(code, UC_LOGGER_LEVEL="loud").stderr


@pytest.mark.parametrize("engines, asked, frame, transfers", [
    ("INFO", "debug", "[UC][W] ", 1), ("DEBUG", "debug", "an engine's: ", 1), ("INFO", "", "an engine's: ", 0),
    ("WARNING", "", "an engine's: ", 0), ("WARNING", "warn", "an engine's: ", 0)])
def test_beside_an_engine_all_that_was_asked_for_is_said_once(tmp_path, engines, asked, frame, transfers):
    """By the engine's logger if that shows it, or else by our own means."""
    code = f"""
import logging, numpy, ucm
from ucm import _log
engine, to = logging.getLogger("engine"), logging.StreamHandler()
to.setFormatter(logging.Formatter("an engine's: %(message)s"))
engine.addHandler(to)
engine.setLevel("{engines}")
engine.propagate = False
_log.share(engine), _log.share(engine)
ucm.Conf({{"posix_gc_enable": True}})
memory = numpy.zeros(4096, numpy.uint8)
with ucm.Store({{"store_pipeline": "Posix", "storage_backends": {str(tmp_path)!r}, "posix_segment_mb": 1,
                "block_size": 4096}}) as store:
    store.dump(store.map([[(memory.ctypes.data, 4096, 4096)]], 1, 1), bytes(16), memory[:4].view("u4")).wait("stored")
"""
    said = run(code, UC_LOGGER_LEVEL=asked).stderr
    (warning,) = [line for line in said.splitlines() if "posix_gc_enable" in line]
    assert frame in warning, said
    assert said.count("Posix task(") == 2 * transfers, said


def test_a_pool_on_a_disk_is_warned_of(tmp_path):
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout.strip()
    for directory, on_disk in ((tmp_path, kind not in ("tmpfs", "ramfs", "hugetlbfs")), ("/dev/shm", False)):
        options = {"store_pipeline": "Cache|Empty", "block_size": 4096, "cache_dir": str(directory),
                   "cache_buffer_capacity_gb": 0.01, "namespace": str(tmp_path)}  # fmt: skip
        r = run(f"import logging; logging.basicConfig(); import ucm; ucm.Store({options}).close()")
        assert (r.returncode, f"cache_dir: {directory} is not in memory" in r.stderr) == (0, on_disk), r.stderr


def test_no_thread_before_the_core_is_used():
    r = run("import ucm, threading; print(threading.active_count()); ucm.Conf(); print(threading.active_count())")
    assert r.stdout.split() == ["1", "2"]


def test_each_transfer_is_said_in_debug(log_to, options):
    """The lines that the documents of older systems give, by which users look for slow transfers."""
    from helpers import Engine, keys, numbers

    lines = Lines()
    log_to(lines, "debug")
    engine = Engine()
    for move in ("dump", "load"):
        with ucm.Store({**options, "store_pipeline": "Cache|Posix", "cache_buffer_capacity_gb": 0.01}) as store:
            getattr(store, move)(engine.map(store), keys("a", "b"), numbers(0, 1)).wait("stored")
    size = 2 * store.block_size
    for tier, operation in (("Cache", "DUMP"), ("Cache", "LOAD"), ("Posix", "Cache2Backend"), ("Posix", "Backend2Cache")):
        lines.wait(f",{operation},2,{size}) dispatching.")
        assert re.fullmatch(rf"{tier} task\(\d+,{operation},2,{size}\) finished, cost [\d.]+ms\.",
                            lines.wait(f",{operation},2,{size}) finished")[1])
