# SPDX-License-Identifier: Apache-2.0
"""What the tests of prefill and decode apart share: a model, what one engine without ucm answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools" / "demo")]

from pd import TOKENS  # noqa: E402
from zygote import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pd")


@pytest.fixture(scope="session")
def zygote(work):
    with Zygote(work / "zygote.log", {"TMPDIR": str(work)}) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def model(work, zygote) -> Path:
    return zygote.run(work / "model.log", "Maker", "make", "llama-tiny", work)


@pytest.fixture(scope="session")
def reference(work, zygote, model):
    """reference(prompts): what one engine without ucm answers."""
    with zygote.life(work / "reference.log", "Engine", model) as engine:
        yield lambda prompts: [a["tokens"] for a in engine.call("ask", prompts, TOKENS)]
