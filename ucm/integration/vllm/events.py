# SPDX-License-Identifier: Apache-2.0
"""KV cache events: which of its blocks this engine can load from ucm again, for routers that send a prompt to
where its beginning lies (vLLM's --kv-events-config).

They follow what a lookup would find.  A block that was given to be saved is announced when it is found, and
taken back when storage says that it is gone, whoever has evicted it.  Storage cannot name all (what it never
got, what went in swarms), so all that are announced are looked at again and again, some at a time.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ucm.integration.vllm import compat

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from ucm.integration.vllm.geometry import Geometry

INTERVAL_S = 0.1  # between two looks
LOOKS = 256  # blocks in a look, of the new ones and of those announced
WAITS_S = 60  # for a block to be found; it was dropped otherwise
MOST = 200_000  # blocks that are waited for, and that are announced; of more the oldest are forgotten, or taken back


class Events:
    def __init__(self, geometry: Geometry, peek: Callable[[bytes], bytes], removed: Callable[[], bytes], medium: str,
                 now: Callable[[], float] = time.monotonic):
        self._geo, self._peek, self._removed, self._medium, self._now = geometry, peek, removed, medium, now
        self._new: deque[tuple[bytes, float, Any]] = deque(maxlen=MOST)  # key, until when, its event
        self._announced: OrderedDict[bytes, list[Any]] = OrderedDict()  # key -> hashes, longest not looked at first
        self._unfindable: list[list[Any]] = []  # hashes that were announced before a reset
        self._next = 0.0
        self.forgotten = 0  # blocks waited for in vain: they came too late, or too many at once

    def saved(self, request: Request, first: int, keys: bytes) -> None:
        """Blocks from that position on are given to be saved."""
        per_block, tokens = self._geo.hashes, self._geo.block_tokens
        until, lora = self._now() + WAITS_S, request.lora_request
        for i in range(len(keys) // 16):
            at = (first + i) * per_block
            hashes = [compat.event_hash(h) for h in request.block_hashes[max(at - 1, 0):at + per_block]]
            self.forgotten += len(self._new) == self._new.maxlen
            self._new.append((keys[16 * i:16 * i + 16], until, compat.block_stored(
                block_hashes=hashes[-per_block:], parent_block_hash=hashes[0] if at else None,
                token_ids=list(request.all_token_ids[(first + i) * tokens:(first + i + 1) * tokens]),
                block_size=tokens // per_block, lora_id=lora.adapter_id if lora else None,
                lora_name=lora.name if lora else None, medium=self._medium)))

    def reset(self) -> None:
        """This engine finds nothing of what it has saved so far any more."""
        self._unfindable += self._announced.values()
        self._announced.clear()
        self._new.clear()

    def take(self) -> list[Any]:
        """The events since the last call.  Called every step."""
        now = self._now()
        if now < self._next or not (self._new or self._announced or self._unfindable):
            return []
        self._next = now + INTERVAL_S
        removed = self._removed()  # the first: it has news read, too
        gone = [self._announced.pop(removed[i:i + 16], None) for i in range(0, len(removed), 16)]
        gone, self._unfindable = self._unfindable + list(filter(None, gone)), []
        return self._gone(gone) + self._look_at_new(now) + self._look_again()

    def _look_at_new(self, now: float) -> list[Any]:
        some = [self._new.popleft() for _ in range(min(LOOKS, len(self._new)))]
        found = self._peek(b"".join(key for key, _, _ in some))
        events = []
        for (key, until, event), there in zip(some, found):
            if there:
                events += [] if key in self._announced else [event]
                self._announced[key] = event.block_hashes
            elif now < until:
                self._new.append((key, until, event))
            else:
                self.forgotten += 1
        over = range(max(0, len(self._announced) - MOST))
        return events + self._gone([self._announced.popitem(last=False)[1] for _ in over])

    def _look_again(self) -> list[Any]:
        some = [self._announced.popitem(last=False) for _ in range(min(LOOKS, len(self._announced)))]
        found = self._peek(b"".join(key for key, _ in some))
        gone = [hashes for (_, hashes), there in zip(some, found) if not there]
        self._announced.update((key, hashes) for (key, hashes), there in zip(some, found) if there)
        return self._gone(gone)

    def _gone(self, blocks: list[list[Any]]) -> list[Any]:
        hashes = list(itertools.chain(*blocks))
        return [compat.block_removed(block_hashes=hashes, medium=self._medium)] if hashes else []
