# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side and the workers' side send each other, by way of vLLM, every step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from ucm.integration.vllm.compat import KVConnectorHandshakeMetadata, KVConnectorWorkerMetadata


NULL_BLOCK = 0  # vLLM's placeholder among engine blocks: nobody reads it, what is not wanted is loaded there


@dataclass
class Stage(KVConnectorHandshakeMetadata):
    """Worker to scheduler, when the engine starts: what one stage of a pipeline stores its blocks as."""

    stage: int
    namespace: str
    block_size: int
    shard_size: int


@dataclass(slots=True)
class Transfer:
    """Blocks of the store, of one request, and where they lie in the engine."""

    req_id: str
    positions: array  # of uint32: the place of each in the request's chain of blocks; one group after the other
    keys: bytes  # 16 each
    blocks: array  # of uint32: engine block numbers, the same count for each key

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def reach(self) -> int:
        """How many positions of the chain it covers, whichever groups need them."""
        return max(self.positions) + 1 - min(self.positions)


@dataclass
class Step(KVConnectorMetadata):
    """Scheduler to worker: the work of one step."""

    seq: int
    acked: int  # the last failed step that the scheduler has taken note of
    loads: list[Transfer]
    saves: list[Transfer] = field(default_factory=list)
    preempted: frozenset[str] = frozenset()  # their engine blocks may be overwritten in this step
    held: frozenset[str] = frozenset()  # finished; the scheduler keeps their blocks until reported
    idle: bool = False  # nothing is computed in this step
    deliver: bool = False  # a producer's prompt ends here: its consumer must find the blocks
    patience_ms: float = 0  # for each block that is loaded; 0: as long as the store allows
    settles: bool = False  # the scheduler waits to hear that it is over: it may compute on what was not loaded


@dataclass
class StepResult(KVConnectorWorkerMetadata):
    """Worker to scheduler: what went wrong in a step.  Sent then, after the first step, and while saves are not known
    to be over; where a group has a window after each, by all workers."""

    namespace: str  # what the worker's store was opened with
    failed: dict[str, int]  # request -> position of its first block that could not be loaded
    spoilt: int = -1  # a step that computed on blocks that had not been loaded; -1: none
    late: bool = False  # a load was given up because it took too long
    settled: int = -1  # this step, if the scheduler waits to hear of it: its loads have ended; -1: it does not
    released: int = -1  # no save of this step or an earlier one reads engine memory any more

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepResult)
        failed = dict(self.failed)
        for req_id, position in other.failed.items():
            failed[req_id] = min(position, failed.get(req_id, position))
        return StepResult(self.namespace, failed, max(self.spoilt, other.spoilt), self.late or other.late,
                          max(self.settled, other.settled), min(self.released, other.released))
