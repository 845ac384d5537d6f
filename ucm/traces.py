# SPDX-License-Identifier: Apache-2.0
"""Request traces: one JSON line a request, written by an engine connector (enable_record_traces).

    {"timestamp": ms since 1970, "input_length": tokens, "output_length": tokens, "block_tokens": 128,
     "hash_ids": [32 hex digits for each full block of the input; the same for the same prefix]}

    python -m ucm.traces [--block-tokens N] FILE|DIRECTORY... > trace.jsonl

merges them in order of time into the format of Mooncake's traces: milliseconds since the first request, and
a number for each block, the last one also if it is not full.  Mooncake's blocks are of 512 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import logging
import logging.handlers
import os
import queue
import socket
import sys
import threading
from pathlib import Path

KEY = 16  # bytes
WAITING = 1000  # lines that may wait to be written; more are dropped
CLOSE_S = 2  # how long an engine that ends waits for them

logger = logging.getLogger("ucm.traces")


class Recorder:
    """Appends to a rotated file, from a thread of its own: a directory that is slow costs lines, not time."""

    def __init__(self, directory: Path, block_tokens: int):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self._lock = _claim(directory)
        self._block_tokens = block_tokens
        self._file = logging.handlers.RotatingFileHandler(
            self.path, maxBytes=_number("UCM_LOG_MAX_SIZE", 5) << 20,
            backupCount=_number("UCM_LOG_MAX_FILES", 10) - 1)
        self._file.handleError = lambda record: self._lose("cannot be written", exc_info=True)
        self._lost = self._told = 0  # lines; of those, how many told by lost()
        self._losing = threading.Lock()
        self._queue: queue.Queue = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write, name="ucm-traces", daemon=True)
        self._thread.start()

    def record(self, arrival_s: float, input_length: int, output_length: int, keys: bytes) -> None:
        try:
            self._queue.put_nowait((arrival_s, input_length, output_length, keys))
        except queue.Full:
            self._lose("come faster than they can be written")

    def lost(self) -> int:
        """Lines lost since it was last asked."""
        new = self._lost - self._told
        self._told += new
        return new

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():  # else the directory hangs, and what waits is lost
            self._file.close()
            self._lock.close()

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            arrival_s, input_length, output_length, keys = item
            line = json.dumps({
                "timestamp": round(arrival_s * 1000), "input_length": input_length, "output_length": output_length,
                "block_tokens": self._block_tokens,
                "hash_ids": [keys[i:i + KEY].hex() for i in range(0, len(keys), KEY)]})
            self._file.emit(logging.makeLogRecord({"msg": line}))

    def _lose(self, why: str, **kwargs) -> None:
        with self._losing:
            self._lost += 1
            first = self._lost == 1
        if first:
            logger.warning("traces %s; some are lost (said once): %s", why, self.path, **kwargs)


def directory_of(option: str) -> Path:
    """record_traces_dir, or what stands for it when it is empty."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(option or os.environ.get("UCM_LOG_PATH") or f"{state}/ucm").expanduser()


def _claim(directory: Path):
    """The first of trace-HOST-0, trace-HOST-1 ... that no other process writes, and the lock that says so:
    engines that start again go on in the same few files, which are bounded."""
    for i in itertools.count():
        path = directory / f"trace-{socket.gethostname()}-{i}.jsonl"
        lock = open(path.with_suffix(".lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path, lock
        except BlockingIOError:
            lock.close()
        except OSError:
            lock.close()
            raise


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) > 0 else default


# ---- reading ----

def read(paths: list[str]) -> list[dict]:
    """The requests in these files, and in all traces of these directories, in order of time."""
    files = [f for p in paths for f in (sorted(Path(p).glob("*.jsonl*")) if os.path.isdir(p) else [Path(p)])]
    requests = []
    for f in files:
        for number, line in enumerate(f.read_text().splitlines(), 1):
            try:
                request = json.loads(line)
                request["timestamp"], request["input_length"], request["block_tokens"], request["hash_ids"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{f}, line {number}: not a request as enable_record_traces writes them") from None
            requests.append(request)
    return sorted(requests, key=lambda r: r["timestamp"])


def convert(requests: list[dict], block_tokens: int = 0):
    """Yields them as Mooncake's traces have them; block_tokens 0: blocks as they were recorded."""
    block_tokens = block_tokens or max((r["block_tokens"] for r in requests), default=1)
    numbers: dict[str, int] = {}
    fresh = itertools.count()
    for r in requests:
        step, rest = divmod(block_tokens, r["block_tokens"])
        if rest:
            raise ValueError(f"--block-tokens: {block_tokens} is no multiple of the {r['block_tokens']} tokens that "
                             "blocks were recorded with")
        ids = []
        for name in r["hash_ids"][step - 1::step]:
            if name not in numbers:
                numbers[name] = next(fresh)
            ids.append(numbers[name])
        if len(ids) * block_tokens < r["input_length"]:
            ids.append(next(fresh))
        yield {"timestamp": r["timestamp"] - requests[0]["timestamp"], "input_length": r["input_length"],
               "output_length": r["output_length"], "hash_ids": ids}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ucm.traces", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE|DIRECTORY")
    parser.add_argument("--block-tokens", type=int, default=0, metavar="N")
    args = parser.parse_args()
    try:
        for request in convert(read(args.paths), args.block_tokens):
            print(json.dumps(request))
    except (OSError, ValueError) as e:
        sys.exit(f"traces: {e}")


if __name__ == "__main__":
    main()
