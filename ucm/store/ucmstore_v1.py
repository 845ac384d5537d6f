# SPDX-License-Identifier: Apache-2.0
"""The store interface that engines and other store implementations program against."""

from abc import ABC, abstractmethod


class Task:
    """A load or dump under way; a store's own class derives from it."""


class UcmKVStoreBaseV1(ABC):
    """Block ids are 16 bytes.  A row of tensors or addresses holds one shard of one block, in order."""

    def __init__(self, config):
        self.config = config

    @abstractmethod
    def lookup(self, block_ids):
        """Whether each block can be loaded: a list of bool, exact."""

    @abstractmethod
    def lookup_on_prefix(self, block_ids):
        """The index of the last block of the leading run that can be loaded; -1 when the first cannot."""

    @abstractmethod
    def prefetch(self, block_ids):
        """A hint that these will be loaded soon."""

    @abstractmethod
    def load(self, block_ids, shard_index, dst_tensor):
        """Loads shard shard_index[i] of block_ids[i] into the tensors dst_tensor[i]; returns a Task."""

    @abstractmethod
    def dump(self, block_ids, shard_index, src_tensor):
        """Stores the tensors src_tensor[i] as shard shard_index[i] of block_ids[i]; returns a Task."""

    @abstractmethod
    def load_data(self, block_ids, shard_index, dst_addr):
        """The same with addresses: a list of lists, or a 2-D array of uint64."""

    @abstractmethod
    def dump_data(self, block_ids, shard_index, src_addr, prerequisite_handle=0):
        """The same with addresses; waits for the device event prerequisite_handle first."""

    @abstractmethod
    def wait(self, task):
        """Until a task is over, a dump stored: RuntimeError when a block failed.  Once for each task."""

    @abstractmethod
    def check(self, task):
        """Whether a task is over, well or not."""
