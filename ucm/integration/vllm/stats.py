# SPDX-License-Identifier: Apache-2.0
"""What is measured, on its way to vLLM's log and to Prometheus.

A Meter stands before the store of each process.  Every step it hands what is new to vLLM, as Stats; vLLM adds
up those of its workers and its scheduler and brings them to the API server's process.  There they become a
log line, and PromMetrics shows those that the file in metrics_config_path names.

Names tell kinds: what ends in _total is a counter, a list holds samples of a histogram, anything else is a
gauge.  Nothing here raises in the API server, whatever the file says: metrics must not end it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from ucm.integration.vllm.messages import Step

logger = logging.getLogger(f"vllm.{__name__}")

# What a Meter adds to the store's own metrics.  Milliseconds, and GB a second.
SCHEDULERS = ("lookup_errors_total", "lookup_refused_total", "loads_late_total", "hit_dram_tokens_total",
              "hit_slower_tokens_total", "traces_lost_total", "events_forgotten_total")
MEASURED = SCHEDULERS + (
    "load_requests_num", "load_blocks_num", "load_duration", "load_speed", "save_requests_num", "save_blocks_num",
    "save_duration", "save_speed", "save_stored_duration", "lookup_duration", "interval_lookup_hit_rates")
KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
LOG_INTERVAL_S = 10
MOST = 1024  # transfers under way, and samples of a histogram, that are kept for a take() that never comes


def kind_of(name: str) -> str:
    if name.endswith("_total"):
        return "counter"
    return "histogram" if name in MEASURED else "gauge"


@dataclass
class Stats(KVConnectorStats):
    """data: of each worker, and of the "scheduler": name -> what it has grown by, samples, or value."""

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for worker, values in other.data.items():
            mine = self.data.setdefault(worker, {})
            for name, value in values.items():
                grows = isinstance(value, list) or name.endswith("_total")
                mine[name] = mine[name] + value if grows and name in mine else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """A log line's worth."""
        def total(name: str) -> float:
            values = [v[name] for v in self.data.values() if name in v]
            return sum(map(sum, values) if values and isinstance(values[0], list) else values)

        line: dict[str, int | float] = {}
        for what, past, counter in (("load", "loaded", "load_bytes_total"), ("save", "saved", "dump_bytes_total")):
            if seconds := total(f"{what}_duration") / 1000:
                line |= {f"blocks {past}": int(total(f"{what}_blocks_num")),
                         f"MB {past}": round(total(counter) / 1e6, 1),
                         f"MB/s {past}": round(total(counter) / 1e6 / seconds, 1)}
        keys, hits = total("lookup_keys_total"), total("lookup_hits_total")
        if keys:
            line["blocks looked up"], line["of which there"] = int(keys), int(hits)
        for name, words in (("load_failed_total", "blocks not loaded"), ("dump_dropped_total", "blocks not saved"),
                            ("tasks_refused_total", "transfers refused"), ("disk_stalled", "backends stalled")):
            if total(name):
                line[words] = int(total(name))
        return line


class Meter:
    """A store, to those who use it; measures what passes."""

    def __init__(self, store: Any, worker: str, interval_s: float = LOG_INTERVAL_S, counters: Iterable[str] = ()):
        self._store = store
        self._worker = worker
        self._interval_s = interval_s
        self._next = 0.0  # when to look at the store though nothing has happened here
        self._seen: dict[str, float] = {}  # the store's metrics when they were last looked at
        self._new: dict[str, Any] = dict.fromkeys(counters, 0)
        self._transfers: deque[tuple[str, Any, int]] = deque(maxlen=MOST)  # under way: kind, task, bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def lookup(self, keys: bytes) -> bytes:
        begin = time.perf_counter()
        try:
            return self._store.lookup(keys)
        except OSError:
            self.count("lookup_errors_total", 1)
            raise
        finally:
            self.sample("lookup_duration", (time.perf_counter() - begin) * 1000)

    def load(self, where: Any, keys: bytes, *args: Any, **kwargs: Any) -> Any:
        return self._watch("load", self._store.load(where, keys, *args, **kwargs), keys)

    def dump(self, where: Any, keys: bytes, *args: Any, **kwargs: Any) -> Any:
        return self._watch("save", self._store.dump(where, keys, *args, **kwargs), keys)

    def close(self) -> None:
        self._transfers.clear()
        self._store.close()

    def begin(self, step: Step) -> None:
        for what, transfers in (("load", step.loads), ("save", step.saves)):
            if transfers:
                self.sample(f"{what}_requests_num", len(transfers))
                self.sample(f"{what}_blocks_num", sum(map(len, transfers)))

    def count(self, name: str, n: float) -> None:
        self._new[name] = self._new.get(name, 0) + n

    def sample(self, name: str, value: float) -> None:
        samples = self._new.setdefault(name, [])
        if len(samples) < MOST:
            samples.append(value)

    def take(self) -> Stats | None:
        """What is new since it was last called."""
        if self._transfers:
            self._transfers = deque((t for t in self._transfers if not self._ended(*t)), MOST)
        now = time.monotonic()
        if not self._new and now < self._next:
            return None
        self._next = now + self._interval_s
        new, self._new = self._new, {}
        seen, self._seen = self._seen, self._store.metrics()
        for name, value in self._seen.items():
            if value != seen.get(name):
                new[name] = value - seen.get(name, 0) if name.endswith("_total") else value
        return Stats(data={self._worker: new}) if new else None

    def _watch(self, kind: str, task: Any, keys: bytes) -> Any:
        self._transfers.append((kind, task, len(keys) // 16 * self._store.block_size))
        return task

    def _ended(self, kind: str, task: Any, size: int) -> bool:
        if not task.done("stored"):
            return False
        released = task.elapsed("released")
        self.sample(f"{kind}_duration", released * 1000)
        if released:
            self.sample(f"{kind}_speed", size / 1e9 / released)
        if kind == "save":
            self.sample("save_stored_duration", task.elapsed("stored") * 1000)
        return True


@dataclass(frozen=True)
class Shown:
    """What metrics_config_path says; without it: nothing."""

    prefix: str = "ucm:"
    interval_s: float = LOG_INTERVAL_S
    metrics: tuple[tuple[str, dict[str, Any]], ...] = ()  # kind, {name, documentation, ...}

    @classmethod
    def read(cls, path: str) -> Shown:
        if not path:
            return cls()
        try:
            with open(path) as f:
                return cls._parse(yaml.safe_load(f))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
            logger.error("metrics_config_path: %s: %s: %s; no metrics of ucm are shown", path, type(e).__name__, e)
            return cls()

    @classmethod
    def _parse(cls, config: dict[str, Any]) -> Shown:
        metrics = []
        for kind in KINDS:
            for item in [*(config.get(kind) or ()), *(config.get(f"{kind}s") or ())]:
                metrics.append((kind, {**item, "name": str(item["name"])}))
        return cls(str(config.get("metric_prefix", cls.prefix)), float(config.get("log_interval", cls.interval_s)),
                   tuple(metrics))

    def warn_of_unknown(self, path: str, store: Any) -> None:
        known = {*store.metrics(), *MEASURED}
        if unknown := [item["name"] for _, item in self.metrics if item["name"] not in known]:
            logger.warning("metrics_config_path: %s: there are no metrics %s", path, ", ".join(unknown))


class PromMetrics(KVConnectorPromMetrics):
    made: list[Any] = []  # by the engine before this one in the process: vLLM forgets its own, too

    def __init__(self, shown: Shown, vllm_config: Any, metric_types: Any, labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._engines = per_engine_labelvalues
        self._metrics: dict[str, Any] = {}
        self._children: dict[tuple[int, str, str], Any] = {}
        while self.made:
            REGISTRY.unregister(self.made.pop())
        for kind, item in shown.metrics:
            try:
                self._metrics[item["name"]] = self._make(metric_types[KINDS[kind]], kind, shown.prefix, item)
            except (ValueError, TypeError) as e:
                logger.error("metrics_config_path: %s is not shown: %s", item["name"], e)

    def _make(self, factory: Any, kind: str, prefix: str, item: dict[str, Any]) -> Any:
        name = item["name"]
        if kind != kind_of(name):
            raise ValueError(f"it is a {kind_of(name)}")
        extra: dict[str, Any] = {}
        if kind == "gauge":
            # One process of the API servers hears of each step.
            extra["multiprocess_mode"] = item.get("multiprocess_mode", "mostrecent")
        elif kind == "histogram" and item.get("buckets"):
            extra["buckets"] = item["buckets"]
        metric = factory(name=prefix + name, documentation=item.get("documentation", name),
                         labelnames=[*self._labelnames, "worker_id"], **extra)
        if factory is KINDS[kind]:  # and not one of another system, as Ray's
            self.made.append(metric)
        return metric

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for worker, values in transfer_stats_data.items():
            for name, value in values.items():
                if (metric := self._child(engine_idx, worker, name)) is None:
                    continue
                if isinstance(value, list):
                    for v in value:
                        metric.observe(v)
                elif name.endswith("_total"):
                    metric.inc(value)
                else:
                    metric.set(value)

    def _child(self, engine: int, worker: str, name: str) -> Any:
        if name not in self._metrics:
            return None
        key = (engine, worker, name)
        if key not in self._children:
            self._children[key] = self._metrics[name].labels(*self._engines[engine], worker)
        return self._children[key]
