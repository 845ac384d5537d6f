# SPDX-License-Identifier: Apache-2.0
"""Engine lives.  One process, the zygote (engine.py), imports vLLM once; each life is a child it forks, with
an engine of its own: 2-4 s instead of 20-30, and a new life is a new process like any restart.

This side needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IMPORT_S, START_S, CALL_S, END_S = 300, 300, 300, 60  # how long to wait for each, in seconds


class Zygote:
    def __init__(self, log: Path, environment: dict[str, str] | None = None):
        begin = time.monotonic()
        self.log = log
        self._socket, theirs = socket.socketpair()
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("engine.py")), str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})})
        theirs.close()
        self._socket.settimeout(IMPORT_S)
        self._receive()
        self.import_s = time.monotonic() - begin

    def life(self, log: Path, what: str, *args: Any, environment: dict[str, str] | None = None,
             **kwargs: Any) -> Life:
        """A process that has made `what` of engine.py ("Engine", "Maker") with these arguments."""
        ours, theirs = socket.socketpair()
        with theirs:
            order = pickle.dumps((str(log), environment or {}, what, args, kwargs))
            self._socket.sendall(len(order).to_bytes(4, "little") + order)
            socket.send_fds(self._socket, [b"!"], [theirs.fileno()])
        return Life(log, int(self._receive()), Connection(ours.detach()))

    def run(self, log: Path, what: str, method: str, *args: Any) -> Any:
        """One call in a process of its own."""
        with self.life(log, what) as life:
            return life.call(method, *args)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(END_S)

    def _receive(self) -> bytes:
        try:
            answer = self._socket.recv(64)
        except TimeoutError:
            answer = b""
        if not answer:
            self._process.kill()
            raise RuntimeError(f"the process that imports vLLM has died or hangs; see {self.log}")
        return answer

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Life:
    """One engine process.  Its output goes to `log`."""

    def __init__(self, log: Path, pid: int, pipe: Connection):
        self.log, self.pid, self._pipe = log, pid, pipe
        self._process = os.pidfd_open(pid)
        self._alive = True
        self.start_s: float = self.reply(START_S)

    def call(self, method: str, *args: Any) -> Any:
        """Runs a method of the object that was made at the start."""
        self.send(method, *args)
        return self.reply()

    def send(self, method: str, *args: Any) -> None:
        """The same without waiting for the reply."""
        self._pipe.send((method, args))

    def reply(self, timeout_s: float = CALL_S) -> Any:
        if not self._pipe.poll(timeout_s):
            self.kill()
            raise TimeoutError(f"engine process {self.pid}: no answer in {timeout_s} s; see {self.log}")
        try:
            good, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self.kill()
            raise RuntimeError(f"engine process {self.pid} has died; see {self.log}") from None
        if not good:
            raise RuntimeError(f"engine process {self.pid}: {value}\nsee {self.log}")
        return value

    def close(self) -> None:
        """Ends the engine in good order."""
        if self._alive:
            with contextlib.suppress(RuntimeError, BrokenPipeError, ConnectionResetError):
                self._pipe.send(None)
                self.reply(END_S)
            self.kill()

    def kill(self) -> None:
        """As a crash does.  Returns when the process is gone."""
        if not self._alive:
            return
        self._alive = False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        gone = poll.poll(END_S * 1000)
        os.close(self._process)
        self._pipe.close()
        if not gone:
            raise TimeoutError(f"engine process {self.pid} cannot be killed")

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
