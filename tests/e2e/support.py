# SPDX-License-Identifier: Apache-2.0
"""What several of the tests use."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from pathlib import Path
from typing import Any

from server import HIT_LINE
from zygote import Life, Zygote

BLOCK, ENGINE = 128, 32  # tokens in a block of the store; in an engine block, where not 128
RATIO = BLOCK // ENGINE
MODES = {"layerwise": {"use_layerwise": True}, "async": {"use_layerwise": False}}


def geometry(layers: int = 1) -> Any:
    """Four engine blocks in a block of the store."""
    from ucm.integration.vllm.geometry import Geometry  # imports vLLM
    from ucm.layout import Form

    return Geometry(engine_tokens=ENGINE, ratio=RATIO, layers=tuple(map(str, range(layers))),
                    form=Form("HNC", apart=False), shard_size=4096, block_size=4096 * layers, namespace="here",
                    hash_seed="0")


class Table:
    """What was shown, as printed after all tests: a row each, a column for each thing that was tried."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    def note(self, row: str, column: str, said: str) -> None:
        self.rows.setdefault(row, {})[column] = said

    def lines(self) -> list[str]:
        columns = list(dict.fromkeys(c for cells in self.rows.values() for c in cells))
        width = max(map(len, self.rows), default=0)
        widths = [max(len(c), *(len(cells.get(c, "")) for cells in self.rows.values())) for c in columns]
        grid = [("", dict(zip(columns, columns))), *sorted(self.rows.items())]
        return [f"{name:<{width}}  " + "  ".join(f"{cells.get(c, ''):<{w}}" for c, w in zip(columns, widths))
                for name, cells in grid]


class Row:
    """One row of the table: what an engine was asked, and whether all was as it must be."""

    def __init__(self, table: Table, name: str, reference: Any):
        self._table, self._name, self._reference = table, name, reference

    def reference(self, prompts: list[list[int]]) -> list[list[int]]:
        """Asked one after the other, as here: experts of a mixture may differ with what shares a batch."""
        return [self._reference([p])[0] for p in prompts]

    def note(self, column: str, good: bool, otherwise: str = "NO") -> None:
        self._table.note(self._name, column, "ok" if good else otherwise)
        assert good, f"{self._name}, {column}: {otherwise}"

    def ask(self, column: str, life: Life, prompts: list[list[int]], blocks: list[int], source: str = "") -> None:
        """One after the other: each answer is what an engine without ucm gives, and so many blocks of each
        are hits, all of them from `source` ("host", "disk")."""
        seen, key = len(hits(life)), f"vllm:prompt_tokens_cached_by_source:{source}"
        before = life.call("metrics").get(key, 0)
        answers = [life.call("ask", [p])[0]["tokens"] for p in prompts]
        found = [external for _, _, external in hits(life)[seen:]]
        loaded = life.call("metrics").get(key, 0) - before
        expected = sum(min(n * BLOCK, len(p) - 1) for n, p in zip(blocks, prompts))
        self.note(column, answers == self.reference(prompts), "WRONG TOKENS")
        self.note(column, found == blocks, f"{sum(found)} of {sum(blocks)} blocks")
        self.note(column, not source or loaded == expected, f"{loaded:.0f} of {expected} tokens from {source}")


class Weather:
    """How long storage takes; see weather.c."""

    HANGS = -1

    def __init__(self, path: Path):
        self._path, self.environment = path, {"UCM_TEST_WEATHER": str(path)}
        path.write_bytes(bytes(12))

    def set(self, reads: int = 0, writes: int = 0, mkdirs: int = 0) -> None:
        """In ms each.  The file is mapped by the engine, so it is written in place."""
        with open(self._path, "r+b") as f:
            f.write(struct.pack("3i", reads, writes, mkdirs))


class Deployment:
    """One storage directory and the engines that use it, one after the other."""

    def __init__(self, zygote: Zygote, model: Path, path: Path, config: dict, connector: dict):
        self.storage = path / "store"
        self.storage.mkdir()
        self._zygote, self._model, self._path = zygote, model, path
        self._count = itertools.count()
        self.config = {
            "ucm_connectors": [{"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": {
                "store_pipeline": "Cache|Posix", "storage_backends": str(self.storage),
                "cache_buffer_capacity_gb": 0.25, "posix_segment_mb": 16, **config}}],
            "use_layerwise": True, **connector}

    def life(self, environment: dict[str, str] | None = None, **options: Any) -> Life:
        log = self._path / f"life-{next(self._count)}.log"
        return self._zygote.life(log, "Engine", self._model, self.config, environment=environment, **options)

    def segments(self, rank: int | None = None) -> list[Path]:
        """The files with the blocks, of one rank or of all."""
        import ucm

        lanes = None if rank is None else {lane["lane"] for lane in ucm.inspect(self.storage) if lane["rank"] == rank}
        return sorted(p for p in self.storage.rglob("seg-*") if lanes is None or p.parent.name in lanes)

    def newest_write(self) -> int:
        """When the storage was last written to."""
        newest = 0
        for path in self.storage.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.stat().st_mtime_ns)
        return newest


def flip_bytes(segments: list[Path], every: int) -> None:
    """In the middle of every n-th part of these files; blocks here are 256 KiB or larger."""
    for path in segments:
        with open(path, "r+b") as f:
            for offset in range(1 << 17, os.path.getsize(path), every):
                f.seek(offset)
                old = f.read(64)
                f.seek(offset)
                f.write(bytes(b ^ 0xFF for b in old))


def tokens(answers: list[dict]) -> list[list[int]]:
    return [a["tokens"] for a in answers]


def hits(life: Life, lost: bool = False) -> list[tuple[int, int, int]]:
    """Of each request so far: full blocks, hits in the engine, hits in ucm.  The line is written before the load:
    unless some are to be lost, all of them have been loaded since, or are about to be."""
    log = life.log.read_text(errors="replace")
    assert ("could not be loaded" in log) == lost and "without asking" not in log
    return [tuple(map(int, m)) for m in HIT_LINE.findall(log)]
