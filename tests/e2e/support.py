# SPDX-License-Identifier: Apache-2.0
"""What several of the tests use."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

from zygote import Life, Zygote

HIT_LINE = re.compile(r"total_blocks_num: (\d+), hit hbm: (\d+), hit external: (\d+)")
BLOCK, ENGINE = 128, 32  # tokens in a block of the store; in an engine block, where not 128
RATIO = BLOCK // ENGINE


def geometry(layers: int = 1) -> Any:
    """Four engine blocks in a block of the store."""
    from ucm.integration.vllm.geometry import Geometry  # imports vLLM

    return Geometry(engine_tokens=ENGINE, ratio=RATIO, layers=tuple(map(str, range(layers))), page_order="HNC",
                    shard_size=4096, block_size=4096 * layers, namespace="here", hash_seed="0")


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

    def segments(self) -> list[Path]:
        return sorted(self.storage.rglob("seg-*"))

    def newest_write(self) -> int:
        """When the storage was last written to."""
        newest = 0
        for path in self.storage.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.stat().st_mtime_ns)
        return newest


def tokens(answers: list[dict]) -> list[list[int]]:
    return [a["tokens"] for a in answers]


def hits(life: Life) -> list[tuple[int, int, int]]:
    """Of each request so far: full blocks, hits in the engine, hits in ucm."""
    return [tuple(map(int, m)) for m in HIT_LINE.findall(life.log.read_text(errors="replace"))]
