# SPDX-License-Identifier: Apache-2.0
"""use_lite: the scheduler's side over a store that remembers keys and has no data (the tier Fake).

Lookups, thresholds and what is saved are those of SchedulerSide; but nothing is loaded, and a save is
remembered here and never reaches a worker.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ucm.integration.vllm.messages import Step
from ucm.integration.vllm.scheduler import Hit, Policy, SchedulerSide

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from ucm.integration.vllm.geometry import Geometry

logger = logging.getLogger(f"vllm.{__name__}")

NOWHERE = 1  # an address: Fake looks at keys only


class LiteSide(SchedulerSide):
    def __init__(self, geometry: Geometry, store: Any, policy: Policy):
        super().__init__(replace(geometry, stages=1), store, policy)  # one memory for all stages
        self._memory = store
        self._map = store.map([[(NOWHERE, 0, geometry.shard_size)]] * store.nshards, 1, 1)
        self._blocks = self._hits = 0  # of all requests so far

    def add_stage(self, stage: int, namespace: str, open_store: Callable[[], Any]) -> None:
        self._namespaces.add(namespace)

    def match(self, request: Request, local_tokens: int) -> Hit:
        new = request.request_id not in self._requests
        hit = super().match(request, local_tokens)
        if new and hit.total:
            self._blocks += hit.total
            self._hits += hit.external
            logger.info("request_id: %s, req external hit rate: %.3f, total external hit rate: %.3f",
                        request.request_id, hit.external / hit.total, self._hits / self._blocks)
        return replace(hit, tokens=0)

    def step(self, out: SchedulerOutput) -> Step:
        step = super().step(out)
        for save in step.saves:
            with contextlib.suppress(OSError):  # hits that will not be counted
                self._memory.dump(self._map, save.keys, array("I", [0]) * len(save))
        step.saves = []
        return step

    def finished(self, request: Request, engine_blocks: list[int]) -> bool:
        super().finished(request, engine_blocks)
        self._held.clear()  # nobody reads its blocks
        self._finished.clear()
        return False

    def close(self) -> None:
        self._map = None
        super().close()
