# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: which blocks of a request to load, which to save.  Bookkeeping, no data.

A request's blocks are counted from the start of its prompt: "position" is a block's place in that chain.
Nothing here raises for the store's sake: trouble is a miss.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from array import array
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucm.integration.vllm.events import Events
from ucm.integration.vllm.messages import Step, StepResult, Transfer
from ucm.integration.vllm.pace import Pace

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from ucm.integration.vllm.geometry import Geometry

logger = logging.getLogger(f"vllm.{__name__}")

NULL_BLOCK = 0  # vLLM's placeholder block: nobody reads it
NO_LIMIT = 1 << 62
STEPS_IN_FLIGHT = 8  # more than vLLM ever schedules ahead of a step's result


@dataclass(frozen=True)
class Policy:
    """What the options ask for."""

    loads: bool
    saves: bool
    asynchronous: bool
    delivers: bool = False  # a producer: what it answers for must be in the storage, for others to load
    dram: bool = True  # whether the first tier is DRAM
    persist_token_threshold: int = 0
    load_tokens_threshold: int = 0
    hit_ratio: float = 1.0
    prompt_only: bool = False  # generated tokens are not wanted, or may be guesses that are rejected later
    lockstep: bool = False  # several workers compute each step: what one of them gets wrong, all do


@dataclass(frozen=True)
class Hit:
    """The answer to a lookup, in tokens and in blocks of the store."""

    tokens: int
    first_time: bool
    total: int = 0
    engine: int = 0
    external: int = 0


class Tracked:
    """What is known of one request."""

    __slots__ = ("request", "looked_up", "tiers", "limit", "local", "trusted", "blocks", "saved", "owed",
                 "dumping", "load")

    def __init__(self, request: Request):
        self.request = request
        self.looked_up = -1  # how many block hashes it had at the last lookup
        self.tiers = b""  # of its leading blocks that the store has: 1 for DRAM, 2 ... for slower
        self.limit = NO_LIMIT  # positions from here on failed to load once: not tried again
        self.local = 0  # tokens in the engine's own prefix cache
        self.trusted = 0  # tokens known to be right when it is next scheduled
        self.blocks: list[int] = []  # its engine blocks
        self.saved = 0  # positions before this need no saving
        self.owed = 0  # positions before this are computed, and saved when that is known to be right
        self.dumping = False  # a save of its blocks may be reading them
        self.load: tuple[int, Transfer] | None = None  # the last one: in which step, what


class SchedulerSide:
    def __init__(self, geometry: Geometry, store: Any, policy: Policy):
        self._geo = geometry
        self._stores = {geometry.stage: store}
        self._namespaces = {geometry.namespace}
        self._policy = policy
        self._requests: dict[str, Tracked] = {}
        self._loads: list[Transfer] = []
        self._held: set[str] = set()
        self._unsettled: set[int] = set()  # steps that load what they compute on, not yet heard of
        self._written: deque[tuple[int, array]] = deque()  # engine blocks, by these steps and those after them
        self._pool: BlockPool | None = None
        self._finished: list[Tracked] = []  # that owe saves
        self._seq = 0
        self._acked = -1
        self._planned: deque[tuple[int, Tracked, int]] = deque()  # saves of recent steps: step, whose, from where
        self._pace = Pace()
        self._store_failed = False
        self._strangers = False
        self._incomplete = False
        self.events: Events | None = None

    @property
    def asynchronous(self) -> bool:
        return self._policy.asynchronous

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def add_stage(self, stage: int, namespace: str, open_store: Callable[[], Any]) -> None:
        """One more stage of a pipeline, told of by its workers.  A hit is what all stages have."""
        self._namespaces.add(namespace)
        if stage not in self._stores:
            self._stores[stage] = open_store()

    # ---- admission ----

    def match(self, request: Request, local_tokens: int) -> Hit:
        """How many tokens beyond local_tokens can be loaded.  Called again and again for a waiting
        request: looks up once, until the request has more hashes or has been admitted."""
        t = self._tracked(request)
        first_time = t.looked_up != len(request.block_hashes)
        if first_time:
            self._lookup(t)
        t.local = t.trusted = local_tokens
        tokens = self._loadable(t)
        if not first_time:
            return Hit(tokens, False)
        size = self._geo.block_tokens
        engine = local_tokens // size
        external = -(-(local_tokens + tokens) // size) - engine if tokens else 0
        return Hit(tokens, True, request.num_tokens // size, engine, external)

    def _lookup(self, t: Tracked) -> None:
        t.looked_up = len(t.request.block_hashes)
        t.tiers, t.saved = b"", 0
        if not self._wanted(t.request):
            return
        try:
            t.tiers = self._look_up(self._keys(t.request, 0, t.looked_up // self._geo.ratio))
        except OSError as e:
            if not self._store_failed:
                logger.error("lookup failed, taken for a miss (said once): %s", e)
            self._store_failed = True
            return
        t.saved = min(len(t.tiers), t.limit)

    def watch(self, medium: str) -> None:
        """From now on there are events."""
        self.events = Events(self._geo, self._peek, self._removed, medium)

    def _peek(self, keys: bytes) -> bytes:
        """Of each, 0 if a stage does not have it."""
        return bytes(map(min, *(store.peek(keys) for store in self._stores.values()), itertools.repeat(255)))

    def _removed(self) -> bytes:
        """What some stage has removed."""
        keys = b""
        for store in self._stores.values():
            with contextlib.suppress(OSError):  # DRAM alone does not say
                keys += store.removed()[0]
        return keys

    def _look_up(self, keys: bytes) -> bytes:
        """Of the leading blocks that every stage has, the slowest tier that is needed."""
        tiers = b""
        for n, store in enumerate(self._stores.values()):
            found = store.lookup(keys)
            absent = found.find(0)
            found = found if absent < 0 else found[:absent]
            tiers = bytes(map(max, tiers, found)) if n else found
            keys = keys[:16 * len(tiers)]
        if len(self._stores) < self._geo.stages:  # MultiConnector passes on only the first child's greetings
            if not self._incomplete:
                logger.error("of %d stages of the pipeline %d have told the scheduler what they store blocks as: "
                             "nothing will be found. If UCMConnector is below MultiConnector, put it first there",
                             self._geo.stages, len(self._stores))
            self._incomplete = True
            return b""
        return tiers

    def _loadable(self, t: Tracked) -> int:
        if not self._policy.loads:
            return 0
        size = self._geo.block_tokens
        hit = min(len(t.tiers), t.limit)
        if self._pace.behind:
            hit = min(hit, len(t.tiers) - len(t.tiers.lstrip(b"\1")) if self._policy.dram else 0)
        if self._policy.hit_ratio < 1:
            hit = min(hit, int(self._policy.hit_ratio * t.request.num_prompt_tokens) // size)
        # The last token is always computed: its output is what the engine is after.
        tokens = min(hit * size, t.request.num_tokens - 1) - t.local
        return tokens if tokens > 0 and tokens >= self._policy.load_tokens_threshold else 0

    def admitted(self, request: Request, engine_blocks: list[int], tokens: int) -> None:
        """The engine has given the request its blocks; this many tokens are to be loaded."""
        t = self._tracked(request)
        t.looked_up = -1
        if tokens == 0:
            return
        ratio, size = self._geo.ratio, self._geo.block_tokens
        first, end = t.local // size, -(-(t.local + tokens) // size)
        # A block of the store whose first engine blocks hold another request's data, which may be in
        # use: these go to the placeholder.
        skip = t.local // self._geo.engine_tokens - first * ratio
        blocks = array("I", engine_blocks[first * ratio:end * ratio])
        for i in range(skip):
            blocks[i] = NULL_BLOCK
        t.trusted = t.local + tokens
        load = Transfer(request.request_id, first, self._keys(request, first, end), blocks, skip)
        t.load = (self._seq + 1, load)
        self._loads.append(load)

    def tiers_of(self, request: Request, tokens: int) -> tuple[int, int]:
        """Of the tokens just admitted to be loaded: how many lie in DRAM, how many in slower tiers."""
        if not self._policy.dram:
            return 0, tokens
        t = self._requests[request.request_id]
        size = self._geo.block_tokens
        end = -(-(t.local + tokens) // size)
        fast = t.tiers.count(1, t.local // size, end) * size
        if fast and t.tiers[t.local // size] == 1:
            fast -= t.local % size
        fast = min(fast, tokens)
        return fast, tokens - fast

    # ---- every step ----

    def step(self, out: SchedulerOutput) -> Step:
        self._seq += 1
        self._pace.look()
        for req_id in out.preempted_req_ids or ():
            self._pace.breaks(req_id)
            if t := self._requests.get(req_id):
                t.dumping, t.load = False, None  # the worker waits for its saves before the blocks are overwritten
                t.owed = 0
        step = Step(self._seq, self._acked, self._loads, preempted=frozenset(out.preempted_req_ids or ()),
                    idle=out.total_num_scheduled_tokens == 0)
        step.patience_ms = self._pace.ms_per_token * self._geo.block_tokens
        if not self._unsettled:
            self._settle_finished(step)
        step.held = frozenset(self._held)
        if self._loads and not self._policy.asynchronous:
            self._unsettled.add(self._seq)
        if self._unsettled:
            self._written.append((self._seq, array("I")))
            for load in self._loads:
                self._written[-1][1].extend(load.blocks)
        self._loads, self._held = [], set()
        while self._planned and self._planned[0][0] < self._seq - STEPS_IN_FLIGHT:
            self._planned.popleft()
        while self._written and self._written[0][0] < self._seq - STEPS_IN_FLIGHT:
            self._written.popleft()
        scheduled = out.num_scheduled_tokens
        for new in out.scheduled_new_reqs:
            if t := self._requests.get(new.req_id):
                t.blocks = list(new.block_ids[0])
                if not step.loads:  # which would count as computing
                    self._pace.begins(t.request, t.request.num_prompt_tokens - new.num_computed_tokens)
                self._plan_save(step, t, new.num_computed_tokens, scheduled[new.req_id])
        cached = out.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            if (t := self._requests.get(req_id)) is None:
                continue
            blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                t.blocks = list(blocks[0])
            elif blocks is not None:
                t.blocks.extend(blocks[0])
            self._plan_save(step, t, cached.num_computed_tokens[i], scheduled.get(req_id, 0))
        return step

    def _plan_save(self, step: Step, t: Tracked, computed: int, scheduled: int) -> None:
        """Blocks that are full at the end of this step and not yet saved."""
        if self._unsettled:
            tokens = self._geo.engine_tokens
            self._written[-1][1].extend(t.blocks[computed // tokens:-(-(computed + scheduled) // tokens)])
        if not self._policy.saves or not self._wanted(t.request):
            return
        if self._policy.delivers and computed < t.request.num_prompt_tokens <= computed + scheduled:
            step.deliver = True
        size, ratio = self._geo.block_tokens, self._geo.ratio
        if computed > t.trusted:
            # Another connector loads these in this very step, and may yet fail: not ours to save, and
            # what is computed on them is not known to be right before the next step.
            t.saved, t.trusted = max(t.saved, -(-computed // size)), NO_LIMIT
            return
        t.trusted = NO_LIMIT
        known = len(t.request.block_hashes) // ratio
        if self._policy.prompt_only:
            known = min(known, t.request.num_prompt_tokens // size)
        full = min((computed + scheduled) // size, known)
        if self._unsettled and self._policy.lockstep:
            # A load may yet fail on one worker, and what the others compute in this step be wrong for it.
            if self._unsettled == {step.seq} and t.owed > t.saved:
                self._save(step, t, t.owed)  # of earlier steps, which went well
            t.owed = full
        elif full > t.saved:
            self._save(step, t, full)

    def _settle_finished(self, step: Step) -> None:
        """What requests that have finished meanwhile were to save."""
        for t in self._finished:
            self._held.add(t.request.request_id)
            if t.owed > t.saved:
                self._save(step, t, t.owed)
        self._finished.clear()

    def _save(self, step: Step, t: Tracked, full: int) -> None:
        ratio = self._geo.ratio
        step.saves.append(Transfer(t.request.request_id, t.saved, self._keys(t.request, t.saved, full),
                                   array("I", t.blocks[t.saved * ratio:full * ratio])))
        if self.events:
            self.events.saved(t.request, t.saved, step.saves[-1].keys)
        self._planned.append((step.seq, t, t.saved))
        t.saved = full
        t.dumping = True

    def heard(self, result: StepResult) -> None:
        """What a worker says went wrong."""
        if result.namespace not in self._namespaces and not self._strangers:
            self._strangers = True
            logger.error("the scheduler and its worker use different namespaces, so nothing will ever be "
                         "found; set model_id. Scheduler: %s worker: %s", self._geo.namespace,
                         result.namespace)
        if result.late:
            self._pace.was_late()
        for req_id, position in result.failed.items():
            if t := self._requests.get(req_id):
                t.limit = min(t.limit, position)
                t.saved = min(t.saved, position)
        if result.spoilt > self._acked:
            self._evict(result.spoilt)
            # From that step on, up to the next one, the worker has saved nothing.
            self._acked = result.spoilt
            for t in (*self._requests.values(), *self._finished):
                t.owed = 0
            for seq, t, start in self._planned:
                if seq >= result.spoilt:
                    t.saved = min(t.saved, start)
        self._unsettled = {step for step in self._unsettled if step > result.settled}
        while self._written and (not self._unsettled or self._written[0][0] < min(self._unsettled)):
            self._written.popleft()

    def bind(self, pool: BlockPool) -> None:
        self._pool = pool

    def _evict(self, spoilt: int) -> None:
        """vLLM has put what the spoilt steps wrote into its own prefix cache, and takes it out of there for
        requests that are still running: not for those that were aborted or preempted meanwhile."""
        blocks = {block for seq, written in self._written if seq >= spoilt for block in written} - {NULL_BLOCK}
        if self._pool is not None:
            self._pool.evict_blocks(blocks)

    def lost(self, engine_blocks: Set[int]) -> None:
        """The same from a worker that can only name engine blocks."""
        result = StepResult(self._geo.namespace, {})
        for req_id, t in self._requests.items():
            if t.load is None:
                continue
            step, load = t.load
            bad = next((i for i, block in enumerate(load.blocks) if block in engine_blocks), None)
            if bad is not None:
                result.failed[req_id] = load.first + bad // self._geo.ratio
                if not self._policy.asynchronous:
                    result.spoilt = max(result.spoilt, step)
        self.heard(result)

    def finished(self, request: Request, engine_blocks: list[int]) -> bool:
        """Whether its engine blocks must be kept until the worker reports it."""
        self._pace.ends(request)
        t = self._requests.pop(request.request_id, None)
        if t is None:
            return False
        owed = self._geo.ratio * t.owed
        owes = t.owed > t.saved and engine_blocks[:owed] == t.blocks[:owed]
        if owes:
            self._finished.append(t)
        elif t.dumping:
            self._held.add(request.request_id)
        return owes or t.dumping

    def prompt_keys(self, request: Request) -> bytes:
        """Of the full blocks of its prompt."""
        return self._keys(request, 0, request.num_prompt_tokens // self._geo.block_tokens)

    # ---- helpers ----

    def _tracked(self, request: Request) -> Tracked:
        t = self._requests.get(request.request_id)
        if t is None:
            t = self._requests[request.request_id] = Tracked(request)
        return t

    def _wanted(self, request: Request) -> bool:
        return request.num_prompt_tokens >= self._policy.persist_token_threshold

    def _keys(self, request: Request, first: int, end: int) -> bytes:
        """A block of the store is named by the hash of the last engine block in it."""
        ratio = self._geo.ratio
        return b"".join([h[:16] for h in request.block_hashes[(first + 1) * ratio - 1:end * ratio:ratio]])
