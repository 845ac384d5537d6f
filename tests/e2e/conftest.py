# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines for the tests: vLLM is imported once, each engine life is a forked process."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools" / "demo"), str(Path(__file__).parent)]

from support import Deployment, Row, Table, Weather  # noqa: E402
from zygote import Life, Zygote  # noqa: E402


# Rows of the test that runs, and of all: with pytest-xdist they travel with the reports of their tests.
TABLE, REPORTED = Table(), Table()


def pytest_configure(config):
    config.addinivalue_line("markers", "row(name): how this test ended is a row of the table")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("row")
    if marker and (report.when == "call" or not report.passed):
        mode = getattr(getattr(item, "callspec", None), "id", "")
        TABLE.note(f"{marker.args[0]} {mode}", "all", "ok" if report.passed else report.outcome.upper())
    report.user_properties.append(("rows", TABLE.rows))
    TABLE.rows = {}
    return report


def pytest_runtest_logreport(report):
    for name, cells in dict(report.user_properties).get("rows", {}).items():
        REPORTED.rows.setdefault(name, {}).update(cells)


def pytest_terminal_summary(terminalreporter):
    if REPORTED.rows:
        terminalreporter.section("token-identical, and every block that should hit hits")
        for line in REPORTED.lines():
            terminalreporter.line(line)


@pytest.fixture
def row(reference):
    """row(name, model_name, **options of its engines) -> Row"""
    return lambda name, model_name="llama-tiny", **options: Row(
        TABLE, name, functools.partial(reference, name=model_name, **options))


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def zygote(work):
    # vLLM leaves sockets and the like in the temporary directory.
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    weather = work / "weather.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", weather, Path(__file__).with_name("weather.c")], check=True)
    with Zygote(work / "zygote.log", {"TMPDIR": str(work), "PYTHONPATH": here.rstrip(os.pathsep),
                                      "LD_PRELOAD": str(weather)}) as z:
        yield z


@pytest.fixture(scope="session")
def model(work, zygote):
    """model(name, seed): the directory of a small model."""
    def make(name: str = "llama-tiny", seed: int = 7) -> Path:
        return zygote.run(work / "models.log", "Maker", "make", name, ROOT / ".cache" / "models", seed)
    return functools.cache(make)


@pytest.fixture(scope="session")
def adapter(work, zygote, model):
    """adapter(name): the directory of a LoRA adapter for llama-tiny."""
    def make(name: str) -> Path:
        return zygote.run(work / "models.log", "Maker", "make_lora", model(), work / name, ord(name))
    return functools.cache(make)


@pytest.fixture(scope="session")
def eagle(work, zygote, model) -> Path:
    """The directory of an EAGLE head for llama-tiny."""
    return zygote.run(work / "models.log", "Maker", "make_eagle", model(), work / "eagle", 9)


@pytest.fixture(scope="session")
def reference(work, zygote, model):
    """reference(prompts, ...): what an engine without ucm answers.  One engine a model and its options, the last two
    of them (1.5 GB each); each prompt once; new ones all together, for generating costs a step a token however many
    prompts share it."""
    lives: dict[Any, Life] = {}
    logs = (work / f"reference-{i}.log" for i in itertools.count())
    answers: dict[Any, list[int]] = {}

    def ask(prompts: list[list[int]], name: str = "llama-tiny", tokens: int = 8,
            **options: Any) -> list[list[int]]:
        engine = (name, repr(sorted(options.items())))
        new = [p for p in prompts if (engine, tokens, tuple(p)) not in answers]
        if new and engine not in lives:
            if len(lives) == 2:
                lives.pop(next(iter(lives))).close()
            lives[engine] = zygote.life(next(logs), "Engine", model(name), **options)
        for p, answer in zip(new, lives[engine].call("ask", new, tokens) if new else []):
            answers[engine, tokens, tuple(p)] = answer["tokens"]
        return [answers[engine, tokens, tuple(p)] for p in prompts]

    yield ask
    for life in lives.values():
        life.close()


@pytest.fixture
def weather(tmp_path) -> Weather:
    """Of the storage of lives with weather.environment, by the I/O engine psync."""
    return Weather(tmp_path / "weather")


@pytest.fixture
def deploy(zygote, model, tmp_path, request):
    """deploy(config, model_name=..., **connector options) -> Deployment"""
    count = itertools.count()

    def make(config: dict | None = None, model_name: str = "llama-tiny", seed: int = 7,
             **connector: Any) -> Deployment:
        path = tmp_path / str(next(count))
        path.mkdir()
        # The DRAM pool of a namespace outlives its tests' directories, so each has its own.
        connector.setdefault("model_id", f"{request.node.name} {tmp_path}")
        return Deployment(zygote, model(model_name, seed), path, config or {}, connector)

    return make
