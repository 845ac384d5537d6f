# SPDX-License-Identifier: Apache-2.0
"""Whether loading is worth its time: what computing costs here, and whether storage keeps up with it.

A load may take twice as long as computing its tokens would, by the prefills of this engine so far, and SHORTEST_MS
at least.  When storage was late only DRAM is loaded from for a while, so that not each request waits in vain.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

FACTOR = 2
SHORTEST_MS = 2000  # less says nothing of storage: a machine that is busy for a moment takes that long
AGAIN_S = 30  # then storage that was late is tried again
MEASURED_TOKENS = 256  # the time for fewer is the step's, not theirs
SAMPLES = 16


class Pace:
    def __init__(self) -> None:
        self._prefills: dict[str, tuple[Request, int, float]] = {}  # under way: whose, of how many tokens, since when
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._late = -float("inf")  # when storage was
        self.ms_per_token = 0.0  # of a load that is worth its time; 0: not known yet

    def begins(self, request: Request, tokens: int) -> None:
        if tokens >= MEASURED_TOKENS and not request.num_output_tokens:  # else it is resumed
            self._prefills[request.request_id] = request, tokens, time.monotonic()

    def look(self) -> None:
        """Which prefills have ended; called every step."""
        if self._prefills:
            for request, _, _ in [p for p in self._prefills.values() if p[0].num_output_tokens]:
                self.ends(request)

    def breaks(self, req_id: str) -> None:
        """It is preempted: its time is no longer that of computing."""
        self._prefills.pop(req_id, None)

    def ends(self, request: Request) -> None:
        """Its prefill, or all of it."""
        _, tokens, begin = self._prefills.pop(request.request_id, (None, 0, 0))
        if tokens and request.num_output_tokens:
            self._samples.append((time.monotonic() - begin) * 1000 / tokens)
            self.ms_per_token = FACTOR * statistics.median(self._samples)

    def was_late(self) -> None:
        if not self.behind:
            logger.warning("storage took longer for blocks than computing them does: for %d s only what is in DRAM is "
                           "loaded", AGAIN_S)
        self._late = time.monotonic()

    @property
    def behind(self) -> bool:
        return time.monotonic() - self._late < AGAIN_S
