# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the connector still makes the calls that vLLM makes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "connector"


def test_the_connectors_figures_can_be_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--repeat", "1"])
    runpy.run_path(str(BENCH), run_name="__main__")
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["empty step", "one request decodes", "8 k tokens, miss", "8 k tokens, hit"]
