# SPDX-License-Identifier: Apache-2.0
"""A discrete-event model of engines that share a store: what `ucm plan` asks.

Engines take steps as vLLM does (first come, first served; prompts in chunks of a budget of tokens, decoding
first); the store and the links are pipes that those who use them share evenly.  Times are seconds, sizes
bytes.  Nothing is random here: equal arguments, equal answers.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass

INF = math.inf


@dataclass(frozen=True)
class Costs:
    """What a step takes is the sum of these."""
    prompt_s: float = 0.0  # a prompt, however long, in the step in which it begins
    token_s: float = 0.0  # a token of a prompt
    square_s: float = 0.0  # attention: a prompt of n tokens takes n^2 of these
    decode_s: float = 0.0  # a step that decodes
    sequence_s: float = 0.0  # a sequence in it
    context_s: float = 0.0  # a token that one of them has behind it
    request_s: float = 0.0  # what a request takes outside of engines


@dataclass(frozen=True)
class Engine:
    costs: Costs = Costs()
    batched_tokens: int = 8192
    sequences: int = 256
    kv_tokens: float = INF  # of KV cache in device memory; a request reserves all it will need
    layers: int = 64
    layerwise: bool = True  # loads stream into the step; else requests wait aside for them


@dataclass(frozen=True)
class Store:
    token_bytes: float = 0.0
    block_tokens: int = 128
    read: float = INF  # bytes/s of all engines together
    write: float = INF
    node: float = INF  # of one engine, each way
    dram_share: float = 0.0  # of what is loaded: from the engine's own node, at the speed of copy
    copy: float = INF  # host to device
    latency_s: float = 0.0


@dataclass(frozen=True)
class System:
    prefill: Engine
    prefills: int
    decode: Engine | None = None  # None: prefill engines do both
    decodes: int = 0
    store: Store = Store()
    link: float | None = None  # bytes/s from prefill to decode; None: through the store


@dataclass
class Request:
    at: float
    prompt: int
    output: int = 1
    hit: int = 0  # tokens of the prompt that are in the store
    first: float = INF  # when its first token was there
    end: float = INF
    sent: float = 0.0

    @property
    def ttft(self):
        return self.first - self.sent

    @property
    def tpot(self):
        return (self.end - self.first) / max(1, self.output - 1)


@dataclass
class Result:
    requests: list
    seconds: float  # from the first arrival to the last end
    prefill_busy: float  # shares of that time
    decode_busy: float
    read: float  # bytes that came from the store
    written: float


class Clock:
    def __init__(self):
        self.now, self._events, self._order = 0.0, [], itertools.count()

    def at(self, when, call, *args):
        heapq.heappush(self._events, (when, next(self._order), call, args))

    def run(self):
        while self._events:
            self.now, _, call, args = heapq.heappop(self._events)
            call(*args)


class Pipe:
    """Lanes with a queue each share what there is: each gets an equal part, up to its own bound."""

    def __init__(self, clock, total=INF, each=INF):
        self.clock, self.total, self.each = clock, total, each
        self.lanes, self.moved, self.last, self.plan = {}, 0.0, 0.0, 0

    def send(self, lane, size, done):
        self.moved += size
        self._settle()
        self.lanes.setdefault(lane, deque()).append([size, done])
        self._next()

    def _rate(self):
        return min(self.each, self.total / len(self.lanes))

    def _settle(self):
        passed, self.last = self.clock.now - self.last, self.clock.now
        if self.lanes and passed > 0:
            gone = self._rate() * passed
            for queue in self.lanes.values():
                queue[0][0] -= gone

    def _next(self):
        self.plan += 1
        if self.lanes:
            least = min(self.lanes, key=lambda lane: self.lanes[lane][0][0])
            after = max(0.0, self.lanes[least][0][0]) / self._rate()
            self.clock.at(self.clock.now + after, self._arrived, self.plan, least)

    def _arrived(self, plan, lane):
        if plan != self.plan:
            return  # others came or went since
        self._settle()
        _, done = self.lanes[lane].popleft()
        if not self.lanes[lane]:
            del self.lanes[lane]
        self._next()
        done()


class Storage:
    def __init__(self, clock, store):
        self.clock, self.store = clock, store
        self.reads = Pipe(clock, store.read, store.node)
        self.writes = Pipe(clock, store.write, store.node)
        self.copies = Pipe(clock, INF, store.copy)

    def blocks(self, tokens):
        """The tokens of whole blocks."""
        return tokens - tokens % self.store.block_tokens

    def load(self, lane, tokens, done):
        """From storage and DRAM, and on to the device, all at the same time: the slowest counts."""
        size = tokens * self.store.token_bytes
        left = [2]

        def part():
            left[0] -= 1
            if not left[0]:
                done()

        def begin():
            self.reads.send(lane, size * (1 - self.store.dram_share), part)
            self.copies.send(lane, size, part)
        self.clock.at(self.clock.now + self.store.latency_s, begin)


class Server:
    """One engine.  load(tokens, done) brings KV caches; done(request) is called at its last token here."""

    def __init__(self, clock, engine, load):
        self.clock, self.engine, self.load = clock, engine, load
        self.waiting, self.prefilling, self.decoding = deque(), [], []
        self.steps = self.context = self.reserved = 0  # steps: every decoding sequence has a token of each
        self.in_flight, self.busy, self.busy_s = 0, False, 0.0
        self.run = None  # steps that only decode go in one event: when they began, seconds each, how many
        self._order = itertools.count()

    def submit(self, request, cached, output, first, done):
        job = _Job(request, cached, output, first, done)
        self.in_flight += request.prompt - cached
        if cached and not self.engine.layerwise:
            self.load(cached, lambda: self._ready(job))
        else:
            job.to_load = cached
            self._ready(job)

    def _ready(self, job):
        self.waiting.append(job)
        if not self.busy:
            self.clock.at(self.clock.now, self._step)  # after all else that happens now
        elif self.run:  # the step under way is the last of them
            start, seconds, steps = self.run
            passed = math.ceil((self.clock.now - start) / seconds) if seconds else 1
            self._decode(start, seconds, min(steps, max(1, passed)))

    def _admit(self, budget):
        """Chunks for the next step: [job, tokens]."""
        chunks = []
        for job in self.prefilling:
            if budget <= 0:
                return chunks
            chunks.append((job, min(budget, job.request.prompt - job.computed)))
            budget -= chunks[-1][1]
        while self.waiting and budget > 0:
            job = self.waiting[0]
            need = job.request.prompt + job.output
            alone = not self.prefilling and not self.decoding
            if not alone and (len(self.prefilling) + len(self.decoding) >= self.engine.sequences
                              or self.reserved + need > self.engine.kv_tokens):
                break
            self.waiting.popleft()
            self.reserved += need
            self.prefilling.append(job)
            chunks.append((job, min(budget, job.request.prompt - job.computed)))
            budget -= chunks[-1][1]
        return chunks

    def _step(self):
        if self.busy:
            return
        decoding = len(self.decoding)
        chunks = self._admit(self.engine.batched_tokens - decoding)
        if not chunks and not decoding:
            return
        self.busy = True
        c = self.engine.costs
        if not chunks:
            steps = self.decoding[0][0] - self.steps
            context = self.context + decoding * (steps - 1) / 2  # the mean
            self._decode(self.clock.now, c.decode_s + c.sequence_s * decoding + c.context_s * context, steps)
            return
        seconds = (c.decode_s if decoding else 0.0) + c.sequence_s * decoding + c.context_s * self.context
        start, to_load = self.clock.now, 0
        for job, tokens in chunks:
            seconds += c.token_s * tokens + c.square_s * tokens * (2 * job.computed + tokens)
            seconds += 0.0 if job.begun else c.prompt_s
            to_load += job.to_load
            job.begun, job.to_load = True, 0
        if to_load:
            self.load(to_load, lambda: self._loaded(start, seconds, chunks))
        else:
            self.clock.at(start + seconds, self._end, start, chunks)

    def _decode(self, start, seconds, steps):
        self.run = run = (start, seconds, steps)
        self.clock.at(start + seconds * steps, lambda: self.run is run and self._end(start, (), steps))

    def _loaded(self, start, seconds, chunks):
        """Layer by layer: computing is behind by one layer's load, or ahead and waits for the last layer."""
        share = 1 / self.engine.layers
        loading = self.clock.now - start
        end = start + max(loading + seconds * share, loading * share + seconds)
        self.clock.at(end, self._end, start, chunks)

    def _end(self, start, chunks, steps=1):
        now, self.busy, self.run = self.clock.now, False, None
        self.busy_s += now - start
        self.steps += steps
        self.context += len(self.decoding) * steps
        while self.decoding and self.decoding[0][0] <= self.steps:
            self._leave(heapq.heappop(self.decoding)[2], decoded=True)
        for job, tokens in chunks:
            job.computed += tokens
            self.in_flight -= tokens
            if job.computed < job.request.prompt:
                continue
            self.prefilling.remove(job)
            if job.first:
                job.first(now)
            if job.output > 1:
                heapq.heappush(self.decoding, (self.steps + job.output - 1, next(self._order), job))
                self.context += job.request.prompt
                self.in_flight += job.request.prompt // 8  # a little, so that those who decode are seen
            else:
                self._leave(job)
        self._step()

    def _leave(self, job, decoded=False):
        self.reserved -= job.request.prompt + job.output
        if decoded:
            self.context -= job.request.prompt + job.output - 1
            self.in_flight -= job.request.prompt // 8
        job.done(job.request)


@dataclass(eq=False)
class _Job:
    request: Request
    computed: int  # tokens that need not be computed, or have been
    output: int
    first: object
    done: object
    to_load: int = 0
    begun: bool = False


def simulate(requests, system, concurrency=0):
    """Plays the requests; with concurrency so many at a time, whatever their arrival, each followed by the next."""
    clock = Clock()
    storage = Storage(clock, system.store)
    link = Pipe(clock, INF, system.link or INF)
    servers = [Server(clock, system.prefill, lambda n, done, i=i: storage.load(i, n, done))
               for i in range(system.prefills)]
    count, size = len(servers), system.store.token_bytes

    def to_decode(i):
        if system.link is None:
            return lambda n, done: storage.load(count + i, n, done)
        return lambda n, done: link.send(i, n * size, done)
    decoders = [Server(clock, system.decode, to_decode(i)) for i in range(system.decodes)] if system.decode else []
    todo = deque(requests if concurrency else ())

    def arrive(request):
        request.sent = clock.now
        clock.at(clock.now + system.prefill.costs.request_s, start, request)

    def start(request):
        server = min(servers, key=lambda s: s.in_flight)
        cached = storage.blocks(min(request.hit, request.prompt - 1))
        fresh = (storage.blocks(request.prompt) - cached) * size
        lane = servers.index(server)

        def computed(_):
            waits = decoders and system.link is None  # the decoder loads what is stored
            storage.writes.send(lane, fresh, (lambda: decode(request)) if waits else (lambda: None))
            if decoders and not waits:
                decode(request)
            elif not decoders:
                ended(request)
        server.submit(request, cached, 1 if decoders else request.output,
                      None if decoders else lambda now: setattr(request, "first", now), computed)

    def decode(request):
        whole = request.prompt if system.link is not None else storage.blocks(request.prompt)
        server = min(decoders, key=lambda s: len(s.decoding) + len(s.waiting) + len(s.prefilling))
        server.submit(request, min(whole, request.prompt - 1), request.output,
                      lambda now: setattr(request, "first", now), ended)

    def ended(request):
        request.end = clock.now
        if todo:
            arrive(todo.popleft())
    if concurrency:
        for _ in range(min(concurrency, len(todo))):
            clock.at(0.0, lambda: todo and arrive(todo.popleft()))
    else:
        for request in requests:
            clock.at(request.at, arrive, request)
    clock.run()
    seconds = max((r.end for r in requests), default=0.0) - min((r.sent for r in requests), default=0.0)
    busy = [sum(s.busy_s for s in group) / (len(group) * seconds) if group and seconds else 0.0
            for group in (servers, decoders)]
    return Result(list(requests), seconds, *busy, storage.reads.moved, storage.writes.moved)
