# SPDX-License-Identifier: Apache-2.0
"""The worker's side: moves blocks between the engine's tensors and the store.

What must hold: engine memory under a transfer is not handed back before the transfer is RELEASED.  A
save's blocks are held by the scheduler until reported here, or waited for when the request is preempted;
a load's are the request's own until it is reported.

A synchronous load streams: it is submitted whole and comes layer by layer, in the order of computing, while
each layer waits for its own part only.  It has ended before anything of the step is relied on: saves, reports.

No step waits for a save, but for one: a producer's prompt ends, and with the answer its consumer comes for
the blocks.  (vLLM sends the answer with that step, whatever becomes of the request's memory later.)
"""

from __future__ import annotations

import errno
import logging
import time
from array import array
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from ucm.integration.vllm import geometry as geo
from ucm.integration.vllm.device import Marks
from ucm.integration.vllm.messages import NULL_BLOCK, Step, StepResult, Transfer
from ucm.integration.vllm.pace import SHORTEST_MS
from ucm.layout import from_kv_caches

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(f"vllm.{__name__}")

GRACE_MS = 1000  # on top of the store's own deadline, which ends each slice
IO_BYTES = 1 << 20  # of a block at a time, in a load that streams: storage reads larger pieces hardly faster
LATE_MS = 100  # how long a producer's answer waits for storage that was late the last time


class WorkerSide:
    def __init__(self, geometry: geo.Geometry, store: Any, num_blocks: int, asynchronous: bool,
                 timeout_ms: int, delivers: bool = False, load_timeout_ms: int = 0,
                 marks: Marks | None = None):
        self._geo = geometry
        self._store = store
        self._num_blocks = num_blocks
        self._asynchronous = asynchronous
        self._timeout_ms = timeout_ms
        self._load_timeout_ms = load_timeout_ms
        self._delivers = delivers
        self._marks = marks or Marks("cpu")
        self._map: Any = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._shard_of: dict[str, int] = {}
        self._streaming: Any = None  # the load that this step computes on
        self._awaited: set[int] = set()  # its shards that the model has asked for
        self._streams = True  # no step has been seen to compute without asking
        self._step: Step | None = None
        self._loading: list[tuple[Any, Transfer, float]] = []  # task, what, when to give up
        self._saving: list[tuple[Any, frozenset[str], int]] = []  # task, whose blocks it reads, of which step
        self._undelivered: list[Any] = []  # of a producer: saves not known to be STORED
        self._late = False  # the last delivery was
        self._held: set[str] = set()
        self._received: set[str] = set()  # asynchronous loads that ended without a task
        self._saved_until = -1  # the last step whose saves have been handed over
        self._dumped = -1  # the last of those that had some
        self._told = -1  # up to which step the scheduler knows that they are over
        self._bad_blocks: set[int] = set()
        self._failed_requests: set[str] = set()  # the same, where blocks cannot tell
        self._failed: dict[str, int] = {}
        self._spoilt = -1
        self._gave_up = False
        self._dropped = 0
        self._introduced = False

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        tensors = {name: kv_caches[name] for name in self._geo.layers}
        layout = from_kv_caches(tensors, self._num_blocks, self._geo.page_tokens or self._geo.engine_tokens)
        geo.check_tensors(self._geo, layout)
        self._map = self._store.map(layout.segments, self._geo.ratio, self._num_blocks)
        self._tensors = tensors  # the map has addresses only
        self._shard_of = layout.shard_of
        logger.info("ucm: an engine block of a layer is %s, in %d pieces", layout.description, layout.nsegs)

    # ---- one step, in the order vLLM calls ----

    def preempted(self, requests: Set[str]) -> None:
        """Called before any block is overwritten."""
        if requests:
            for task, owners, _ in self._saving:
                if not owners.isdisjoint(requests) and not task.done("released"):
                    self._settle(task, "save")

    def begin(self, step: Step) -> None:
        self.preempted(step.preempted)  # the wrapper of vllm-ascend does not pass on handle_preemptions
        self._step = step

    def load(self) -> None:
        step = self._step
        assert step is not None
        if not step.loads:
            return
        if self._asynchronous:
            for load in step.loads:
                self._load_aside(load)
        else:
            self._load_now(step)

    def _load_aside(self, load: Transfer) -> None:
        task = self._submit([load])
        if task is None:
            self._report(load, range(len(load)))
            self._received.add(load.req_id)
        else:
            deadline = time.monotonic() + (self._timeout_ms + GRACE_MS) / 1000
            self._loading.append((task, load, deadline))

    def _load_now(self, step: Step) -> None:
        self._awaited.clear()
        self._streaming = self._submit(step.loads, max(1, IO_BYTES // self._geo.shard_size))
        if self._streaming is None:
            self._spoil(step, list(range(sum(map(len, step.loads)))))
        elif not self._streams:
            self._settle(self._streaming, "load")

    def wait_for_layer(self, name: str) -> None:
        """Until this layer of the load is there.  Which blocks have failed is asked at the end."""
        shard = self._shard_of.get(name)
        if self._streaming is None or shard is None:  # or of a layer that uses an earlier one's blocks
            return
        self._awaited.add(shard)
        try:
            self._streaming.wait_shard(shard, self._timeout_ms + GRACE_MS)
        except TimeoutError:
            self._settle(self._streaming, "load")  # what comes later would be read half
        except OSError:
            pass

    def _end_load(self) -> None:
        """The last moment at which the load of this step may still be under way."""
        task, self._streaming = self._streaming, None
        if task is None:
            return
        step = self._step
        assert step is not None
        self._settle(task, "load")
        failed = task.failed()
        if self._streams and not step.idle and len(self._awaited) < len(set(self._shard_of.values())):
            self._streams = False
            logger.warning("the model computes without asking for each layer's blocks, so from now on loads are "
                           "waited for before it begins; what it has computed so is computed again")
            failed = list(range(sum(map(len, step.loads))))
        if failed:
            self._see_why(task, failed)
            self._spoil(step, failed)

    def _spoil(self, step: Step, failed: list[int]) -> None:
        """What this step computes is wrong, also for requests that share those blocks."""
        self._spoilt = step.seq
        start = 0
        for load in step.loads:
            bad = [i - start for i in failed if start <= i < start + len(load)]
            if bad:
                self._report(load, bad)
            start += len(load)

    def save(self) -> None:
        step = self._step
        assert step is not None
        self._end_load()
        # A failed load spoils the steps up to the first that was planned in its knowledge.
        if step.saves and self._geo.saves and self._spoilt <= step.acked:
            self._dumped = step.seq
            self._dump(step)
        if step.deliver:
            self._deliver()
        # Not before: with a draft model reports are asked for first, and the step may save what it holds.
        self._held |= step.held
        self._saved_until = step.seq

    def _dump(self, step: Step) -> None:
        keys, blocks, depths = _join(step.saves)
        try:
            task = self._marks.after(lambda event: self._store.dump(self._map, keys, blocks, depths, after=event))
        except OSError as e:
            self._dropped += len(depths)
            if self._dropped == len(depths):
                logger.warning("%d blocks not saved (said once): %s", len(depths), e)
            return
        self._saving.append((task, frozenset(s.req_id for s in step.saves), step.seq))
        if self._delivers:
            self._undelivered = [t for t in self._undelivered if not t.done("stored")]
            self._undelivered.append(task)

    def _deliver(self) -> None:
        """Waits until all saves so far are STORED: a block may have come with another request's.  What fails
        or is late is a miss for the consumer; storage that was late is hardly waited for until it keeps up."""
        end = time.monotonic() + (LATE_MS if self._late else self._timeout_ms) / 1000
        late = False
        for task in self._undelivered:
            try:
                task.wait("stored", max(0, round((end - time.monotonic()) * 1000)))
            except TimeoutError:
                late = True
            except OSError:
                pass  # not stored, and never will be
        self._undelivered.clear()
        if late and not self._late:
            logger.warning("blocks were not stored within %d ms: their consumer will compute them, and until "
                           "the storage keeps up answers wait %d ms for it", self._timeout_ms, LATE_MS)
        self._late = late

    def transfers_done(self) -> tuple[set[str] | None, set[str] | None]:
        """Finished requests whose blocks may be freed; requests whose loads have ended."""
        self._end_load()  # with a draft model vLLM asks this before save()
        step = self._step
        if step is not None and step.idle:
            self._doze()
        self._saving = [s for s in self._saving if not s[0].done("released")]
        sent = None
        if self._held:
            busy = set().union(*(owners for _, owners, _ in self._saving))
            sent = self._held - busy
            self._held &= busy
        received, self._received = self._received, set()
        if self._loading:
            self._reap_loads(received)
        return sent or None, received or None

    def _reap_loads(self, received: set[str]) -> None:
        now, pending = time.monotonic(), []
        for task, load, deadline in self._loading:
            if not task.done("released"):
                if now > deadline:
                    task.cancel()
                pending.append((task, load, deadline))
                continue
            if failed := task.failed():
                self._see_why(task, failed)
                self._report(load, failed)
            received.add(load.req_id)
        self._loading = pending

    def bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def failed_requests(self) -> set[str]:
        """Those of whose loads nothing counts, of the requests whose loads have ended."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def result(self) -> StepResult | None:
        step = self._step
        settled = step.seq if step and step.settles else -1
        news = self._told < self._dumped or any(self._geo.windows)
        if self._introduced and not self._failed and settled < 0 and not news:
            return None
        self._introduced = True
        failed, self._failed = self._failed, {}
        gave_up, self._gave_up = self._gave_up, False
        self._told = min((seq - 1 for _, _, seq in self._saving), default=self._saved_until)
        return StepResult(self._geo.namespace, failed, self._spoilt, gave_up, settled, self._told)

    def close(self) -> None:
        try:
            loading = [task for task, *_ in self._loading]
            for task in [*loading, self._streaming] if self._streaming else loading:
                task.cancel()
                self._settle(task, "load")
        finally:
            self._streaming = None
            self._loading.clear()
            self._saving.clear()
            self._undelivered.clear()
            self._map = None
            self._store.close()  # ends the saves under way, within its timeout

    # ---- helpers ----

    def _submit(self, loads: list[Transfer], group: int = 0) -> Any | None:
        try:
            return self._marks.after(lambda event: self._store.load(
                self._map, *_join(loads), group=group, after=event, timeout_ms=self._patience(loads)))
        except OSError as e:
            logger.warning("load of %d requests not begun, taken for misses: %s", len(loads), e)
            return None

    def _patience(self, loads: list[Transfer]) -> int:
        """How long these may take, in ms, beside those under way; 0: as long as the store allows."""
        assert self._step is not None
        if self._load_timeout_ms or not self._step.patience_ms:
            return self._load_timeout_ms
        reach = sum(load.reach for load in loads) + sum(load.reach for _, load, _ in self._loading)
        return max(SHORTEST_MS, round(self._step.patience_ms * reach))

    def _see_why(self, task: Any, failed: list[int]) -> None:
        self._gave_up |= any(task.status(i) == -errno.ETIMEDOUT for i in failed)

    def _settle(self, task: Any, what: str) -> None:
        """Until the engine's memory is no longer touched.  The store ends every slice by its own deadline;
        if that fails, going on would corrupt other requests."""
        for _ in range(2):
            try:
                task.wait("released", self._timeout_ms + GRACE_MS)
            except OSError:
                pass  # an error of a block, or the deadline
            if task.done("released"):
                return
            task.cancel()
        raise RuntimeError(f"ucm: a {what} still holds engine memory after {2 * self._timeout_ms} ms; "
                           f"is the storage backend hanging?")

    def _report(self, load: Transfer, failed: Sequence[int]) -> None:
        """Everything from the first bad block on is computed again.  Without what came before, where vLLM cannot be
        told which block it was."""
        good = min(failed) if self._geo.plain else 0
        self._failed[load.req_id] = min(load.positions[i] for i in failed)
        if self._geo.plain:
            self._bad_blocks |= set(load.blocks[good * self._geo.ratio:]) - {NULL_BLOCK}
        else:
            self._failed_requests.add(load.req_id)
        logger.warning("request %s: %d of %d blocks could not be loaded and will be computed",
                       load.req_id, len(load) - good, len(load))

    def _doze(self) -> None:
        """An engine with nothing to compute asks again and again: sleep until something ends, at most 1 ms."""
        saves = self._saving if self._held or any(self._geo.windows) else []  # which hold memory that is wanted
        tasks = [t for t, *_ in self._loading or saves]
        if tasks:
            try:
                tasks[0].wait("released", 1)
            except OSError:
                pass  # seen when it is reaped


def _join(transfers: list[Transfer]) -> tuple[bytes, array, array]:
    """One batch: keys, engine blocks, positions."""
    if len(transfers) == 1:
        t = transfers[0]
        return t.keys, t.blocks, t.positions
    blocks, depths = array("I"), array("I")
    for t in transfers:
        blocks.extend(t.blocks)
        depths.extend(t.positions)
    return b"".join([t.keys for t in transfers]), blocks, depths
