# SPDX-License-Identifier: Apache-2.0
import numpy as np

NSHARDS, SHARD, NBLOCKS = 4, 4096, 16


class Engine:
    """Memory as an engine keeps it: [layer][block] of bytes, and the segments that say so."""

    def __init__(self, nblocks=NBLOCKS, nshards=NSHARDS, shard=SHARD):
        self.bytes = np.zeros((nshards, nblocks, shard), np.uint8)
        base = self.bytes.ctypes.data
        self.segments = [[(base + i * nblocks * shard, shard, shard)] for i in range(nshards)]
        self.nblocks = nblocks

    def fill(self, seed):
        self.bytes[:] = np.random.default_rng(seed).integers(0, 256, self.bytes.shape, np.uint8)
        return self

    def map(self, store):
        return store.map(self.segments, 1, self.nblocks)


def keys(*names):
    return b"".join(str(name).encode().ljust(16, b".") for name in names)


def numbers(*values):
    return np.array(values, np.uint32)
