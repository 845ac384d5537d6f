# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: which blocks of a request to load, which to save.  Bookkeeping, no data.

A request's blocks are counted from the start of its prompt: "position" is a block's place in that chain, the
same in all groups of layers.  A group with a window needs no block before it: such a block is not looked up and
not loaded, and not saved once vLLM has given its memory back.  Nothing here raises for the store's sake: trouble
is a miss.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
from array import array
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucm.integration.vllm.events import Events
from ucm.integration.vllm.messages import NULL_BLOCK, Step, StepResult, Transfer
from ucm.integration.vllm.pace import Pace

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from ucm.integration.vllm.geometry import Geometry

logger = logging.getLogger(f"vllm.{__name__}")

NO_LIMIT = 1 << 62
DRAM_ONLY = bytes((0, 1)) + bytes(254)  # tiers that count while slower ones are behind
SLOWER = bytes(tier != 1 for tier in range(256))
STEPS_IN_FLIGHT = 64  # more than vLLM ever schedules ahead of a step's result


@dataclass(frozen=True)
class Policy:
    """What the options ask for."""

    loads: bool
    saves: bool
    asynchronous: bool
    recomputes: bool = True  # a load that fails costs computing; else vLLM fails its request
    delivers: bool = False  # a producer: what it answers for must be in the storage, for others to load
    dram: bool = True  # whether the first tier is DRAM
    persist_token_threshold: int = 0
    load_tokens_threshold: int = 0
    hit_ratio: float = 1.0
    prompt_only: bool = False  # generated tokens are not wanted, or may be guesses that are rejected later
    lockstep: bool = False  # several workers compute each step: what one of them gets wrong, all do
    hears: bool = True  # workers can answer


@dataclass(frozen=True)
class Hit:
    """The answer to a lookup, in tokens and in blocks of the store."""

    tokens: int
    first_time: bool
    total: int = 0
    engine: int = 0
    external: int = 0


class Found:
    """What the last lookup has found of one group."""

    __slots__ = ("tiers", "start")

    def __init__(self, positions: int):
        self.tiers = bytearray(positions)  # of each: 1 for DRAM, 2 ... for slower, 0 for absent or not asked for
        self.start = positions  # from here on it was asked for what somebody may need

    def run(self, position: int) -> int:
        """The end of what is there from this position on."""
        at = self.tiers.find(0, position)
        return len(self.tiers) if at < 0 else at


class Tracked:
    """What is known of one request."""

    __slots__ = ("request", "salt", "looked_up", "found", "reach", "limit", "local", "trusted", "computed", "blocks", "saved",
                 "owed", "dumping", "load")

    def __init__(self, request: Request, groups: int, salt: int):
        self.request = request
        self.salt = salt  # of the keys of its last lookup
        self.looked_up = -1  # how many block hashes it had at the last lookup
        self.found = [Found(0) for _ in range(groups)]  # what the store has
        self.reach = 0  # tokens: up to there it has what every group needs
        self.limit = NO_LIMIT  # positions from here on failed to load once: not tried again
        self.local = 0  # tokens in the engine's own prefix cache
        self.trusted = 0  # tokens known to be right when it is next scheduled
        self.computed = 0  # tokens, when it was last scheduled
        self.blocks: list[list[int]] = [[] for _ in range(groups)]  # its engine blocks
        self.saved = [0] * groups  # positions before this need no saving
        # By which step positions before which are computed: saved when that is known to be right.
        self.owed: list[tuple[int, int]] = []
        self.dumping = -1  # the last step that saves blocks of its
        self.load: tuple[int, Transfer] | None = None  # the last one: in which step, what


class SchedulerSide:
    def __init__(self, geometry: Geometry, store: Any, policy: Policy):
        self._geo = geometry
        # Who needs all of a prompt is asked first: what is absent there, nobody needs.
        self._groups = sorted(range(len(geometry.windows)), key=lambda group: geometry.windows[group])
        self._salt = 0
        self._stores = {geometry.stage: store}
        self._namespaces = {geometry.namespace}
        self._policy = policy
        self._requests: dict[str, Tracked] = {}
        self._loads: list[Transfer] = []
        self._held: set[str] = set()
        self._unsettled: set[int] = set()  # steps that load what they compute on, not yet heard of
        self._doubtful: set[int] = set()  # those that others than the worker which saves may get wrong
        self._written: deque[tuple[int, array]] = deque()  # engine blocks, by these steps and those after them
        self._pool: BlockPool | None = None
        self._pinned: deque[tuple[int, list[KVCacheBlock]]] = deque()  # in windows, saved by these steps
        self._finished: list[Tracked] = []  # that owe saves
        self._seq = 0
        self._acked = -1
        self._released = -1  # no save of this step or an earlier one reads engine memory any more
        self._planned: deque[tuple[int, Tracked, list[int]]] = deque()  # saves of recent steps: step, whose, from where
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
        first_time = t.looked_up != len(request.block_hashes) or t.salt != self._salt
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
        t.looked_up, t.salt = len(t.request.block_hashes), self._salt
        size = self._geo.block_tokens
        known = min(t.looked_up // self._geo.hashes, t.limit) if self._wanted(t.request) else 0
        t.found = [Found(known) for _ in t.found]
        # The last token is always computed: its output is what the engine is after.
        t.reach = self._reach(t, min(known * size, t.request.num_tokens - 1))
        t.saved = [found.run(-(-t.reach // size)) for found in t.found]

    def _reach(self, t: Tracked, tokens: int, only: bytes | None = None) -> int:
        """The longest prefix, of at most so many tokens, up to which the store has what every group needs."""
        size = self._geo.block_tokens
        while tokens > 0:
            end = -(-tokens // size)
            absent = (self._absent(t, group, self._geo.first_needed(group, tokens), end, only)
                      for group in self._groups)
            missing = next((position for position in absent if position >= 0), -1)
            if missing < 0:
                break
            tokens = missing * size
        return max(tokens, 0)

    def _absent(self, t: Tracked, group: int, first: int, end: int, only: bytes | None) -> int:
        """The first of these positions that is not there, or in a tier that `only` leaves out; or -1."""
        found = t.found[group]
        if first < found.start:
            # What lies in the window first.  If that is not enough, all that comes before it at once: news of
            # what is absent may cost a wait each time.
            begin, stop = (first, end) if found.start == len(found.tiers) else (0, found.start)
            found.tiers[begin:stop] = self._look_up(self._keys(t.request, group, begin, stop))
            found.start = begin
        return (found.tiers.translate(only) if only else found.tiers).find(0, first, end)

    def watch(self, medium: str) -> None:
        """From now on there are events."""
        self.events = Events(self._geo, self._peek, self._removed, medium)

    def _peek(self, keys: bytes) -> bytes:
        """Of each, 0 if a stage does not have it, or has not told yet what it is."""
        if len(self._stores) < self._geo.stages:
            return bytes(len(keys) // 16)
        return bytes(map(min, *(store.peek(keys) for store in self._stores.values()), itertools.repeat(255)))

    def _removed(self) -> bytes:
        """What some stage has removed."""
        keys = b""
        for store in self._stores.values():
            with contextlib.suppress(OSError):  # DRAM alone does not say
                keys += store.removed()[0]
        return keys

    def _look_up(self, keys: bytes) -> bytes:
        """Of each block the slowest tier that is needed, for it is what all stages have; 0: one has it not."""
        count, tiers = len(keys) // 16, b""
        if len(self._stores) < self._geo.stages:  # MultiConnector passes on only the first child's greetings
            if not self._incomplete:
                logger.error("of %d stages of the pipeline %d have told the scheduler what they store blocks as: "
                             "nothing will be found. If UCMConnector is below MultiConnector, put it first there",
                             self._geo.stages, len(self._stores))
            self._incomplete = True
            self._stores[self._geo.stage].count("lookup_refused_total", 1)
            return bytes(count)
        try:
            for n, store in enumerate(self._stores.values()):
                found = store.lookup(keys)
                tiers = bytes(max(pair) * all(pair) for pair in zip(tiers, found)) if n else found
                tiers = tiers.rstrip(b"\0")
                keys = keys[:16 * len(tiers)]  # what one lacks is not asked of the next
        except OSError as e:
            if not self._store_failed:
                logger.error("lookup failed, taken for a miss (said once): %s", e)
            self._store_failed = True
            return bytes(count)
        return tiers.ljust(count, b"\0")

    def _loadable(self, t: Tracked) -> int:
        if not self._policy.loads:
            return 0
        tokens, only, size = t.reach, None, self._geo.block_tokens
        if self._policy.hit_ratio < 1:
            tokens = min(tokens, int(self._policy.hit_ratio * t.request.num_prompt_tokens) // size * size)
        if self._pace.behind:
            tokens, only = (tokens, DRAM_ONLY) if self._policy.dram else (0, None)
        tokens = self._reach(t, tokens, only) - t.local
        return tokens if tokens > 0 and tokens >= self._policy.load_tokens_threshold else 0

    def admitted(self, request: Request, engine_blocks: tuple[list[int], ...], tokens: int) -> None:
        """The engine has given the request its blocks; this many tokens are to be loaded."""
        t = self._tracked(request)
        t.looked_up = -1
        if tokens == 0:
            return
        ratio, size = self._geo.ratio, self._geo.block_tokens
        end = -(-(t.local + tokens) // size)
        own = t.local // self._geo.engine_tokens  # engine blocks before this hold another request's data
        load = Transfer(request.request_id, array("I"), b"", array("I"))
        for group in self._groups:
            first = max(t.local // size, self._geo.first_needed(group, t.local + tokens))
            # A block of the store may begin with engine blocks that are in use: these go to the placeholder, as do
            # those that have left the window.
            skip = max(0, own - first * ratio)
            load.blocks.extend([NULL_BLOCK] * skip)
            load.blocks.extend(engine_blocks[group][first * ratio + skip:end * ratio])
            load.positions.extend(range(first, end))
            load.keys += self._keys(request, group, first, end)
        t.trusted = t.local + tokens
        t.load = (self._seq + 1, load)
        self._loads.append(load)

    def tiers_of(self, request: Request, tokens: int) -> tuple[int, int]:
        """Of the tokens just admitted to be loaded: how many lie in DRAM, how many in slower tiers."""
        if not self._policy.dram:
            return 0, tokens
        t = self._requests[request.request_id]
        size = self._geo.block_tokens
        begin, end = t.local // size, -(-(t.local + tokens) // size)
        slow = 0  # a byte for each position: 1 where a group has it in a slower tier
        for group, found in enumerate(t.found):
            first = max(begin, self._geo.first_needed(group, t.local + tokens))
            slow |= int.from_bytes(found.tiers[first:end].translate(SLOWER), "little") << 8 * (first - begin)
        fast = (end - begin - slow.bit_count()) * size
        if fast and not slow & 1:
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
                t.dumping, t.load = -1, None  # the worker waits for its saves before the blocks are overwritten
                t.owed.clear()
        step = Step(self._seq, self._acked, self._loads, preempted=frozenset(out.preempted_req_ids or ()),
                    idle=out.total_num_scheduled_tokens == 0)
        if self._policy.recomputes:  # else a load is not given up for being slow
            step.patience_ms = self._pace.ms_per_token * self._geo.block_tokens
        self._settle_finished(step)
        step.held = frozenset(self._held)
        self._loads, self._held = [], set()
        while self._planned and self._planned[0][0] < self._seq - STEPS_IN_FLIGHT:
            self._planned.popleft()
        while self._written and self._written[0][0] < self._seq - STEPS_IN_FLIGHT:
            self._written.popleft()
        oldest = min(self._unsettled | self._doubtful, default=self._seq)
        if oldest < self._seq - STEPS_IN_FLIGHT:  # whoever runs the workers does not hand their answers on
            self.heard(StepResult(self._geo.namespace, {}, spoilt=oldest, settled=oldest))
        scheduled = out.num_scheduled_tokens
        computing: list[tuple[Tracked, int, int]] = []  # whose tokens: after how many, how many
        for new in out.scheduled_new_reqs:
            if t := self._requests.get(new.req_id):
                t.blocks = [list(blocks) for blocks in new.block_ids]
                if not step.loads:  # which would count as computing
                    self._pace.begins(t.request, t.request.num_prompt_tokens - new.num_computed_tokens)
                computing.append((t, new.num_computed_tokens, scheduled[new.req_id]))
        cached = out.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            if (t := self._requests.get(req_id)) is None:
                continue
            new_blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                t.blocks = [list(blocks) for blocks in new_blocks]
            elif new_blocks is not None:
                for blocks, more in zip(t.blocks, new_blocks):
                    blocks.extend(more)
            computing.append((t, cached.num_computed_tokens[i], scheduled.get(req_id, 0)))
        self._note_doubts(step, computing, getattr(out, "has_sync_kv_loads", True))
        for t, computed, count in computing:
            self._plan_save(step, t, computed, count)
        return step

    def _note_doubts(self, step: Step, computing: list[tuple[Tracked, int, int]], loads: bool) -> None:
        """Whether what this step computes may turn out to be wrong.  loads: somebody's load comes in this step."""
        ours = bool(step.loads) and not self._policy.asynchronous
        # Another connector loads these in this very step, and may yet fail; vLLM's own cache has them already, for
        # others.
        theirs = loads and self._policy.saves and self._policy.hears and any(
            computed > t.trusted for t, computed, _ in computing)
        step.settles = ours or theirs
        if step.settles:
            self._unsettled.add(step.seq)
        if theirs or ours and self._policy.lockstep:
            self._doubtful.add(step.seq)
        if self._unsettled:
            self._written.append((step.seq, array("I")))
            for load in step.loads:
                self._written[-1][1].extend(load.blocks)

    def _plan_save(self, step: Step, t: Tracked, computed: int, scheduled: int) -> None:
        """Blocks that are full at the end of this step and not yet saved."""
        theirs, t.trusted = computed > t.trusted, NO_LIMIT
        if self._unsettled:
            tokens = self._geo.engine_tokens
            for blocks in t.blocks:
                self._written[-1][1].extend(blocks[computed // tokens:-(-(computed + scheduled) // tokens)])
        if not self._policy.saves or not self._wanted(t.request):
            return
        if self._policy.delivers and computed < t.request.num_prompt_tokens <= computed + scheduled:
            step.deliver = True
        size, t.computed = self._geo.block_tokens, computed
        if theirs:  # what another connector loads is not ours to save, unless it fails
            self._planned.append((step.seq, t, t.saved))
            t.saved = [max(saved, -(-computed // size)) for saved in t.saved]
            if not self._policy.hears:  # and what is computed on it is not known to be right before the next step
                return
        known = len(t.request.block_hashes) // self._geo.hashes
        if self._policy.prompt_only:
            known = min(known, t.request.num_prompt_tokens // size)
        t.owed.append((step.seq, min((computed + scheduled) // size, known)))
        self._settle(step, t)

    def _settle_finished(self, step: Step) -> None:
        """What requests that have finished meanwhile were to save."""
        for t in self._finished:
            self._settle(step, t)
            if not t.owed:
                self._held.add(t.request.request_id)
        self._finished = [t for t in self._finished if t.owed]

    def _settle(self, step: Step, t: Tracked) -> None:
        """Saves what is known to be right.  A worker itself saves nothing of a step that its own load has spoilt, but
        the load may fail on another, or be another connector's."""
        doubtful = min(self._doubtful, default=NO_LIMIT)
        full = 0
        while t.owed and t.owed[0][0] < doubtful:
            _, full = t.owed.pop(0)
        self._save(step, t, full)

    def _save(self, step: Step, t: Tracked, full: int) -> None:
        """Blocks before that position that are not saved yet, and still there.  Who was looked up before a reset
        computes on what is of before it."""
        if full <= min(t.saved) or t.salt != self._salt:
            return
        ratio, before = self._geo.ratio, t.saved
        save = Transfer(t.request.request_id, array("I"), b"", array("I"))
        for group in self._groups:
            first = max(before[group], self._geo.first_whole(group, t.computed))
            if first < full:
                blocks, keys = t.blocks[group][first * ratio:full * ratio], self._keys(t.request, group, first, full)
                save.positions.extend(range(first, full))
                save.keys += keys
                save.blocks.extend(blocks)
                if self.events and group == self._groups[0]:
                    self.events.saved(t.request, first, keys)
                if self._geo.windows[group]:
                    self._pin(step.seq, blocks)
        t.saved = [max(saved, full) for saved in before]
        if save.positions:
            step.saves.append(save)
            self._planned.append((step.seq, t, before))
            t.dumping = step.seq

    def _pin(self, seq: int, engine_blocks: list[int]) -> None:
        """A block that leaves its window goes back to vLLM's pool while its request runs on: not while a save of
        this step may be reading it."""
        assert self._pool is not None
        blocks = [self._pool.blocks[block] for block in engine_blocks]
        self._pool.touch(blocks)
        self._pinned.append((seq, blocks))

    def frees(self) -> bool:
        """Whether blocks become free when saves under way have let go of them."""
        return any(block.ref_cnt == 1 for _, blocks in self._pinned for block in blocks)

    def heard(self, result: StepResult, bad: Set[int] = frozenset()) -> None:
        """What a worker says went wrong; the engine blocks that some connector failed to load."""
        if self._pool is not None and bad:  # vLLM takes out those of requests only that are still running
            self._pool.evict_blocks(bad)
        if result.namespace not in self._namespaces and not self._strangers:
            self._strangers = True
            logger.error("the scheduler and its worker use different namespaces, so nothing will ever be "
                         "found; set model_id. Scheduler: %s worker: %s", self._geo.namespace,
                         result.namespace)
        if result.late:
            self._pace.was_late()
        for req_id, position in result.failed.items():
            if t := self._requests.get(req_id):
                # Where a failure costs the whole load, one more is not risked after the second.
                again = t.limit < NO_LIMIT and not self._geo.plain
                t.limit = 0 if again else min(t.limit, position)
                t.looked_up = -1  # what was found may reach beyond it
                t.saved = [min(saved, position) for saved in t.saved]
        if result.spoilt > self._acked:
            self._evict(result.spoilt)
            # From that step on, up to the next one, the worker has saved nothing.
            self._acked = result.spoilt
            for t in (*self._requests.values(), *self._finished):
                t.owed.clear()
            for seq, t, before in self._planned:
                if seq >= result.spoilt:
                    t.saved = list(map(min, t.saved, before))
        self._unsettled = {step for step in self._unsettled if step > result.settled}
        self._doubtful = {step for step in self._doubtful if step > result.settled}
        while self._written and (not self._unsettled or self._written[0][0] < min(self._unsettled)):
            self._written.popleft()
        self._released = max(self._released, result.released)
        while self._pinned and self._pinned[0][0] <= self._released:
            self._pool.free_blocks(self._pinned.popleft()[1])

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
                result.failed[req_id] = load.positions[bad // self._geo.ratio]
                if not self._policy.asynchronous:
                    result.spoilt = max(result.spoilt, step)
        self.heard(result)

    def finished(self, request: Request, engine_blocks: tuple[list[int], ...]) -> bool:
        """Whether its engine blocks must be kept until the worker reports it."""
        self._pace.ends(request)
        t = self._requests.pop(request.request_id, None)
        if t is None:
            return False
        owed = self._geo.ratio * t.owed[-1][1] if t.owed else 0
        owes = owed > self._geo.ratio * min(t.saved) and all(
            given[:owed] == known[:owed] for given, known in zip(engine_blocks, t.blocks))
        if owes:
            self._finished.append(t)
        elif t.dumping > self._released:
            self._held.add(request.request_id)
        return owes or t.dumping > self._released

    def prompt_keys(self, request: Request) -> bytes:
        """Of the full blocks of its prompt, whatever engine asks and when."""
        return self._names(request, 0, request.num_prompt_tokens // self._geo.block_tokens)

    def reset(self) -> bool:
        """From now on this engine finds and saves other blocks than before, which nobody else does.  Returns whether
        the memory of the KV cache may be given back: not while a request that is to go on is being saved."""
        self._salt = secrets.randbits(128)
        if self.events:
            self.events.reset()
        return all(t.dumping <= self._released for t in self._requests.values())

    # ---- helpers ----

    def _tracked(self, request: Request) -> Tracked:
        t = self._requests.get(request.request_id)
        if t is None:
            t = self._requests[request.request_id] = Tracked(request, len(self._groups), self._salt)
        return t

    def _wanted(self, request: Request) -> bool:
        return request.num_prompt_tokens >= self._policy.persist_token_threshold

    def _names(self, request: Request, first: int, end: int) -> bytes:
        """A block of the store is named by the last of vLLM's hashes in it."""
        hashes = self._geo.hashes
        return b"".join([h[:16] for h in request.block_hashes[(first + 1) * hashes - 1:end * hashes:hashes]])

    def _keys(self, request: Request, group: int, first: int, end: int) -> bytes:
        """Names, mixed with the group's number and the salt."""
        names, mask = self._names(request, first, end), group << 120 ^ self._salt
        if mask == 0:
            return names
        masks = mask.to_bytes(16, "little") * (len(names) // 16)
        return (int.from_bytes(names, "little") ^ int.from_bytes(masks, "little")).to_bytes(len(names), "little")
