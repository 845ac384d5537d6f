# SPDX-License-Identifier: Apache-2.0
"""Run against an installed ucm: `pip install .`, then `pytest tests/python`."""

import os
import sys

# `python -m pytest` puts the source tree, which has no extension, before what is installed.
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _ROOT]

import pytest  # noqa: E402
from helpers import NSHARDS, SHARD, Engine  # noqa: E402

import ucm  # noqa: E402


@pytest.fixture
def options(tmp_path):
    """A store that other tests cannot meet."""
    return {
        "store_pipeline": "Posix",
        "storage_backends": str(tmp_path),
        "posix_segment_mb": 1,
        "namespace": f"test {tmp_path}",
        "block_size": NSHARDS * SHARD,
        "shard_size": SHARD,
    }


@pytest.fixture
def open_store(options):
    """open_store(**changes) -> Store; closed when the test is over."""
    stores = []

    def open_store(**changes):
        stores.append(ucm.Store({**options, **changes}))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def engine():
    return Engine()
