# SPDX-License-Identifier: Apache-2.0
"""ucm: a persistent, tiered store for the KV caches of LLM engines.

    conf = ucm.Conf({"store_pipeline": "Cache|Posix", "storage_backends": "/mnt/kv",
                     "namespace": "my-model bf16 tp1", "block_size": 2097152, "shard_size": 65536})
    with ucm.Store(conf) as store:
        map = store.map(segments, blocks_per_key=1, nblocks=1024)
        store.dump(map, keys, blocks).wait("stored")
        hits = store.lookup_prefix(keys)
        store.load(map, keys, blocks).wait()

Keys are one bytes-like object, 16 bytes each; block numbers any contiguous uint32 buffer.  Errors of the
core are OSError with its errno and text.  include/ucm.h is the manual.
"""

import atexit

try:
    from ._ucm import KEY_SIZE, Conf, Map, Store, Task, close_all, inspect, strerror, version
except ModuleNotFoundError as e:
    if e.name != f"{__name__}._ucm":
        raise
    raise ImportError(
        f"{__path__[0]} is a source tree without its extension: run `pip install .` there and start "
        "Python elsewhere, or `pip install --no-build-isolation -e .` to work on it"
    ) from None
from ._log import DEBUG, ERROR, INFO, WARN, log_to

atexit.register(close_all)  # before the log is closed: what is registered last runs first

__version__ = version()
__all__ = [
    "Conf", "Store", "Map", "Task", "KEY_SIZE", "inspect", "strerror", "version",
    "log_to", "ERROR", "WARN", "INFO", "DEBUG",
]
