# SPDX-License-Identifier: Apache-2.0
"""The connector against the interface of each version of vLLM.  Nothing of vLLM needs to be installed."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `python -m pytest` puts the source tree, which has no extension, before what is installed.
sys.path[:] = [str(Path(__file__).parent), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]

import source  # noqa: E402


def _child(pipe: Any, archive: Path, work: Any, args: tuple) -> None:
    import imitation

    try:
        imitation.install(source.Source(archive))
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def archive():
    """archive(version) -> the source of that version; skips where it cannot be had."""
    def get(version: str) -> Path:
        try:
            return source.fetch(version, ROOT / ".cache" / "vllm")
        except source.Unreachable as e:
            pytest.skip(str(e))
    return get


@pytest.fixture
def imitated(archive):
    """imitated(version, work, *args): what work(*args) returns in a process that has that vLLM."""
    def run(version: str, work: Any, *args: Any) -> Any:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(theirs, archive(version), work, args))
        process.start()
        theirs.close()
        try:
            good, value = ours.recv()
        except EOFError:
            good, value = False, "the process died"
        process.join()
        assert good, value
        return value
    return run
