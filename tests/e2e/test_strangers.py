# SPDX-License-Identifier: Apache-2.0
"""Blocks that this engine cannot load are said by name (ucm/integration/vllm/strangers.py)."""

from __future__ import annotations

import json

import pytest
from models import prompt
from support import MODES, hits

OWN = {"model": {"config": "one"}, "dtype": "torch.bfloat16", "block_tokens": 128, "layout": "HNC cpu", "layers": 4}


@pytest.fixture
def storage(tmp_path):
    """storage(identity, stored): a namespace of that identity."""
    def add(identity: dict | None, stored: bool = True) -> None:
        folder = tmp_path / "ucm" / str(len(list((tmp_path / "ucm").glob("*"))))
        folder.mkdir(parents=True)
        (folder / "namespace.json").write_text(json.dumps({"namespace": json.dumps(identity)}) if identity else "{")
        if stored:
            (folder / "lane").mkdir()
    return add


@pytest.fixture
def said(tmp_path, caplog):
    """said(misses): what is said at the start, and after so many lookups that found nothing."""
    from ucm.integration.vllm.strangers import Strangers

    made = []

    def say(misses: int = 0, hit: bool = False) -> str:
        strangers = made[0] if made else Strangers(str(tmp_path), json.dumps(OWN))
        made[:] = [strangers]
        if hit:
            strangers.found(3)
        for _ in range(misses):
            strangers.found(0)
        strangers._thread.join()
        text, _ = caplog.text, caplog.clear()
        return text
    return say


def test_what_differs_is_named(storage, said):
    storage({**OWN, "dtype": "torch.float16", "layout": "NHC cpu"})
    text = said()
    assert "dtype torch.float16 (here torch.bfloat16), layout NHC cpu (here HNC cpu)" in text and "block_tokens" not in text
    assert said(misses=100) == ""  # once


@pytest.mark.parametrize("theirs", [
    {**OWN}, {**OWN, "layers": 8},  # another stage of a pipeline
    {**OWN, "model": {"config": "two"}, "dtype": "torch.float16"}, None, {"dtype": "torch.float16"}])
def test_nothing_is_said_of_what_is_no_trouble(storage, said, theirs):
    storage(theirs)
    assert said(misses=40) == ""


def test_own_blocks_are_enough(storage, said):
    storage({**OWN, "dtype": "torch.float16"})
    storage(OWN)
    assert said() == ""


def test_a_store_that_only_looked_says_nothing(storage, said):
    storage({**OWN, "dtype": "torch.float16"})
    storage(OWN, stored=False)
    assert "dtype torch.float16" in said()


def test_who_starts_later_is_seen_while_nothing_is_found(storage, said):
    assert said() == ""
    storage({**OWN, "block_tokens": 256})
    assert said(misses=14) == ""
    assert "block_tokens 256 (here 128)" in said(misses=1)


def test_who_finds_blocks_does_not_look_again(storage, said):
    assert said() == ""
    storage({**OWN, "block_tokens": 256})
    assert said(misses=40, hit=True) == ""


def test_an_engine_says_so(deploy):
    d = deploy(**MODES["layerwise"])
    with d.life() as life:
        life.call("ask", [prompt(600, 1)])
    d.config["chunk_tokens"] = 256
    with d.life() as life:
        life.call("ask", [prompt(600, 1)])
        assert hits(life) == [(2, 0, 0)]
        assert "Stored by others with block_tokens 128 (here 256). Make what differs equal" in life.log.read_text()
