# SPDX-License-Identifier: Apache-2.0
"""UcmPipelineStore: the documented Python interface of a store, over ucm.Store.

Any stack `A|B` that the tiers allow is legal as store_pipeline: there is no registry of combinations.
"""

import threading
from array import array

import ucm
from ucm.config import set_all
from ucm.store.ucmstore_v1 import Task, UcmKVStoreBaseV1

# Said by engines to every store.  Addresses come with each call and the namespace decides who shares, so
# nothing of this has an effect beyond the sizes of the tensors in a shard, and the device where one is named.
_CONSUMED = ("device_id", "unique_id", "tensor_size", "tensor_size_list", "local_rank_size")


class PipelineTask(Task):
    def __init__(self, task, tensors):
        self.task = task
        self.tensors = tensors  # kept while their memory is used


class UcmPipelineStore(UcmKVStoreBaseV1):
    def __init__(self, config):
        super().__init__(config)
        options = {key: value for key, value in config.items() if key not in _CONSUMED}
        conf = ucm.Conf()
        set_all(conf, options)
        sizes = _tensor_sizes(config, conf)
        if "namespace" not in options:
            conf.set("namespace", f"store, tensors of {'+'.join(map(str, sizes)) or 'any size'}")
        self._host = conf.get("device") in ("auto", "host", "sim")
        if not self._host:
            conf.set("device_id", max(0, int(config.get("device_id", 0))))  # -1: who moves nothing
        self.store = ucm.Store(conf)
        self._sizes = array("Q", sizes)
        self._under_way = []  # tasks whose tensors may not go before they are over
        self._lock = threading.Lock()  # guards it

    def close(self):
        self.store.close()

    def lookup(self, block_ids):
        return [tier != 0 for tier in self.store.lookup(_keys(block_ids))]

    def lookup_on_prefix(self, block_ids):
        return self.store.lookup_prefix(_keys(block_ids)) - 1

    def prefetch(self, block_ids):
        self.store.prefetch(_keys(block_ids))

    def load(self, block_ids, shard_index, dst_tensor):
        addresses, sizes, tensors = self._of_tensors("dst_tensor", dst_tensor)
        return self._submit(self.store.load_sg, block_ids, shard_index, addresses, sizes, tensors, self._mark(tensors))

    def dump(self, block_ids, shard_index, src_tensor):
        addresses, sizes, tensors = self._of_tensors("src_tensor", src_tensor)
        return self._submit(self.store.dump_sg, block_ids, shard_index, addresses, sizes, tensors, self._mark(tensors))

    def load_data(self, block_ids, shard_index, dst_addr):
        return self._submit(self.store.load_sg, block_ids, shard_index, *self._of_addresses("dst_addr", dst_addr))

    def dump_data(self, block_ids, shard_index, src_addr, prerequisite_handle=0):
        addresses, sizes, memory = self._of_addresses("src_addr", src_addr)
        return self._submit(
            self.store.dump_sg, block_ids, shard_index, addresses, sizes, memory, prerequisite_handle
        )

    def wait(self, task):
        if task.task is None:
            raise RuntimeError("this task was waited for already")
        error = None
        try:
            task.task.wait("stored")
        except OSError as e:
            error = e
        over, task.task, task.tensors = task.task, None, None
        if error:
            raise RuntimeError(f"entries {over.failed()} of the task failed: {error.strerror}") from error

    def check(self, task):
        return task.task is None or task.task.done("stored")

    def _submit(self, call, block_ids, shard_index, addresses, sizes, tensors, after=0):
        task = PipelineTask(
            call(_keys(block_ids), array("I", shard_index), 1, addresses, sizes, after=after), tensors
        )
        if tensors is not None:
            with self._lock:
                self._under_way = [t for t in self._under_way if t.task is not None and not t.task.done()]
                self._under_way.append(task)
        return task

    def _mark(self, tensors):
        """What the engine has queued for its device by now must end first; the mark lives as long as the tensors."""
        if self._host or not tensors:
            return 0
        import torch

        event = torch.Event(tensors[0][0].device)
        event.record()
        tensors.append(event)
        return event.event_id

    def _of_tensors(self, name, rows):
        sizes = [tensor.numel() * tensor.element_size() for tensor in rows[0]] if rows else []
        for i, row in enumerate(rows):
            for k, tensor in enumerate(row):
                if (tensor.device.type == "cpu") != self._host:
                    raise ValueError(f"{name}[{i}][{k}]: on {tensor.device}; this store takes "
                                     f"{'CPU tensors' if self._host else 'those of its device'}: see the option device")
                if not tensor.is_contiguous():
                    raise ValueError(f"{name}[{i}][{k}]: not contiguous")
            if [tensor.numel() * tensor.element_size() for tensor in row] != sizes:
                raise ValueError(f"{name}[{i}]: the tensors have other sizes than those of {name}[0]")
        if sizes and sum(sizes) != self.store.shard_size:
            raise ValueError(f"{name}: {sum(sizes)} bytes in a row, a shard has {self.store.shard_size}")
        addresses = array("Q", [tensor.data_ptr() for row in rows for tensor in row])
        return addresses, array("Q", sizes or [self.store.shard_size]), [tuple(row) for row in rows]

    def _of_addresses(self, name, rows):
        if isinstance(rows, (list, tuple)):
            width = len(rows[0]) if rows else 0
            for i, row in enumerate(rows):
                if len(row) != width:
                    raise ValueError(f"{name}[{i}]: {len(row)} addresses, {name}[0] has {width}")
            addresses = array("Q", [address for row in rows for address in row])
        else:
            addresses = memoryview(rows)
            if addresses.ndim != 2:
                raise ValueError(f"{name}: a row of addresses for each block is needed, not {addresses.ndim} dimensions")
            width = addresses.shape[1]
        return addresses, self._split(name, width), None

    def _split(self, name, width):
        """The sizes of the tensors at a row's addresses: as configured, else equal parts of a shard."""
        if width == len(self._sizes):
            return self._sizes
        if width == 0:
            return array("Q", [self.store.shard_size])
        if self._sizes or self.store.shard_size % width:
            raise ValueError(
                f"{name}: {width} addresses in a row; a shard of {self.store.shard_size} bytes has "
                f"{len(self._sizes) or 'equal'} tensors"
            )
        return array("Q", [self.store.shard_size // width] * width)


def _tensor_sizes(config, conf):
    """The bytes of each tensor in a shard, or an empty list when nobody said."""
    shard = int(conf.get("shard_size")) or int(conf.get("block_size"))
    size, sizes = config.get("tensor_size") or 0, list(config.get("tensor_size_list") or [])
    if size:
        if shard % size:
            raise ValueError(f"tensor_size: {size} does not divide shard_size {shard}")
        return [size] * (shard // size)
    if sizes and sum(sizes) != shard:
        raise ValueError(f"tensor_size_list: {sum(sizes)} bytes in all, shard_size is {shard}")
    return sizes


def _keys(block_ids):
    for i, block_id in enumerate(block_ids):
        if len(block_id) != ucm.KEY_SIZE:
            raise ValueError(f"block_ids[{i}]: {len(block_id)} bytes, not {ucm.KEY_SIZE}: {bytes(block_id)!r}")
    return b"".join(block_ids)
