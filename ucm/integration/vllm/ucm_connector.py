# SPDX-License-Identifier: Apache-2.0
"""UCMConnector: what vLLM calls.  --kv-transfer-config '{"kv_connector": "UCMConnector",
"kv_connector_module_path": "ucm.integration.vllm.ucm_connector", "kv_role": "kv_both",
"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"UCM_CONFIG_FILE": "ucm.yaml"}}'

vLLM makes one instance in the scheduler's process and one in each worker's.  This class only splits the
calls by role; the work is in scheduler.py and worker.py.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.logger import init_logger

import ucm
from ucm import _log, config
from ucm.integration.vllm import compat, device
from ucm.integration.vllm import geometry as geo
from ucm.integration.vllm.lite import LiteSide
from ucm.integration.vllm.messages import Stage, Step, StepResult
from ucm.integration.vllm.scheduler import Policy, SchedulerSide
from ucm.integration.vllm.stats import SCHEDULERS, Meter, PromMetrics, Shown, Stats
from ucm.integration.vllm.strangers import Strangers
from ucm.integration.vllm.worker import WorkerSide
from ucm.traces import Recorder, directory_of

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorHandshakeMetadata,
        KVConnectorTransferResults,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Below "vllm", whose handlers and level then apply.
logger = init_logger(f"vllm.{__name__}")


class UCMConnector(KVConnectorBase_V1, compat.SupportsHMA):
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole,
                 kv_cache_config: KVCacheConfig | None = None):
        super().__init__(vllm_config, role, kv_cache_config)
        _log.share(logging.getLogger("vllm"))
        conf = config.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        geometry = geo.derive(vllm_config, kv_cache_config, int(conf.get("chunk_tokens")),
                              conf.get("model_id"))
        self._conf, self._geometry = conf, geometry
        if conf.get("use_lite") != "true":  # which has the scheduler's memory of keys only
            conf.set("rank", geometry.rank)
            conf.set("ranks", geometry.ranks)
        policy = _policy(conf, vllm_config, geometry)
        timeout_ms = int(conf.get("timeout_ms"))
        shown = Shown.read(conf.get("metrics_config_path"))
        scheduling = role == KVConnectorRole.SCHEDULER
        device_type = vllm_config.device_config.device_type
        device.settle(conf, device_type, moves=not scheduling and conf.get("use_lite") != "true")
        worker_id = "scheduler" if scheduling else str(vllm_config.parallel_config.rank)
        self._meter = store = Meter(self._open(geometry), worker_id, shown.interval_s, SCHEDULERS if scheduling else ())
        # A wrapper does not show statistics, and under MultiConnector those end the server.
        self._measured = not _wrapped(vllm_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._traces: Recorder | None = None
        self._strangers: Strangers | None = None
        if scheduling:
            shown.warn_of_unknown(conf.get("metrics_config_path"), store)
            side = LiteSide if conf.get("use_lite") == "true" else SchedulerSide
            self._scheduler = side(geometry, store, policy)
            logger.info("ucm: blocks of %d tokens, %d bytes; %s", geometry.block_tokens,
                        geometry.block_size, geometry.namespace)
            if policy.loads and policy.asynchronous:
                logger.info("ucm: loads wait aside: %s", _aside(conf, vllm_config, geometry))
            if policy.loads and conf.get("use_lite") != "true":
                self._strangers = Strangers(conf.get("storage_backends"), geometry.namespace)
            if policy.loads and not policy.recomputes:
                logger.warning("kv_load_failure_policy is \"fail\", vLLM's default: a block that cannot be loaded "
                               "fails its request. Give \"kv_load_failure_policy\": \"recompute\" beside kv_role.")
            if geometry.hash_seed == compat.RANDOM_SEED:
                logger.warning("vLLM's block hashes differ from process to process: nothing stored now will "
                               "be found after a restart. Set PYTHONHASHSEED to the same number everywhere.")
            if getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False):
                self._scheduler.watch("STORAGE" if "Posix" in conf.get("store_pipeline") else "CPU")
            if conf.get("enable_record_traces") == "true":
                self._traces = Recorder(directory_of(conf.get("record_traces_dir")), geometry.block_tokens)
                logger.info("ucm: a line for each request goes to %s", self._traces.path)
        else:
            self._worker = WorkerSide(geometry, store, kv_cache_config.num_blocks, policy.asynchronous,
                                      timeout_ms, policy.delivers, int(conf.get("load_timeout_ms")),
                                      device.Marks(device_type, conf.get("enable_event_sync") == "true"))

    def _open(self, what: geo.Geometry | Stage) -> ucm.Store:
        for key in ("namespace", "block_size", "shard_size"):
            self._conf.set(key, getattr(what, key))
        return ucm.Store(self._conf)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of a whole step would not wait for each layer's blocks."""
        return config.from_extra_config(extra_config).get("use_layerwise") == "true"

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is lost is a miss later

    # ---- when the engine starts ----

    def get_handshake_metadata(self) -> Stage | None:
        g = self._geometry
        return Stage(g.stage, g.namespace, g.block_size, g.shard_size) if g.stages > 1 else None

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Any, KVConnectorHandshakeMetadata]) -> None:
        for stage in metadata.values():
            if isinstance(stage, Stage):
                self._scheduler.add_stage(stage.stage, stage.namespace, partial(self._open, stage))

    set_xfer_handshake_metadata = set_xfer_handshake_metadata_pp_aware

    # ---- scheduler ----

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._scheduler.bind(gpu_block_pool)

    def reset_cache(self) -> bool | None:
        idle = self._scheduler.reset()
        logger.info("ucm: what was stored so far is not found by this engine any more, and what it stores from now on "
                    "by no other, nor after a restart")
        if not idle:
            logger.warning("ucm: memory of the KV cache is still read, to save requests that have not ended: the engine "
                           "must not sleep now; ask again")
        return idle

    def get_num_new_matched_tokens(self, request: Request,
                                   num_computed_tokens: int) -> tuple[int | None, bool]:
        hit = self._scheduler.match(request, num_computed_tokens)
        if hit.first_time:
            logger.info("request_id: %s, total_blocks_num: %d, hit hbm: %d, hit external: %d",
                        request.request_id, hit.total, hit.engine, hit.external)
            if hit.total:
                self._meter.sample("interval_lookup_hit_rates", hit.external / hit.total)
                if self._strangers:
                    self._strangers.found(hit.external)
        return hit.tokens, self._scheduler.asynchronous and hit.tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks,
                                 num_external_tokens: int) -> None:
        self._scheduler.admitted(request, blocks.get_block_ids(), num_external_tokens)
        if num_external_tokens:
            fast, slow = self._scheduler.tiers_of(request, num_external_tokens)
            self._meter.count("hit_dram_tokens_total", fast)
            self._meter.count("hit_slower_tokens_total", slow)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        return compat.cache_hit_sources(*self._scheduler.tiers_of(request, num_external_tokens))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        result = compat.worker_answer(connector_output)
        if isinstance(result, StepResult):
            bad = connector_output.invalid_block_ids or set()  # another connector's, too
            if bad:
                result.spoilt = max(result.spoilt, result.settled)
            self._scheduler.heard(result, bad)
            self._meter.count("loads_late_total", result.late)
        elif not compat.WORKERS_ANSWER and connector_output.invalid_block_ids:
            self._scheduler.lost(connector_output.invalid_block_ids)

    def take_events(self) -> list[Any]:
        if (events := self._scheduler.events) is None:
            return []
        taken = events.take()
        if events.forgotten:
            self._meter.count("events_forgotten_total", events.forgotten)
            events.forgotten = 0
        return taken

    def request_finished_all_groups(self, request: Request,
                                    block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        if self._traces:
            self._traces.record(request.arrival_time, request.num_prompt_tokens, request.num_output_tokens,
                                self._scheduler.prompt_keys(request))
            if lost := self._traces.lost():
                self._meter.count("traces_lost_total", lost)
        return self._scheduler.finished(request, block_ids), None

    def request_finished(self, request: Request,
                         block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))  # before 0.30

    def has_pending_block_frees(self) -> bool:
        return self._scheduler.frees()

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Step | set[str]) -> None:
        self._worker.preempted(compat.preempted(kv_connector_metadata))

    def bind_connector_metadata(self, connector_metadata: Step) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._meter.begin(connector_metadata)
        self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata,
                      **kwargs: Any) -> None:
        pass  # whole blocks are saved in wait_for_save

    def wait_for_save(self) -> None:
        self._worker.save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        done = self._worker.transfers_done()
        if failed := self._worker.failed_requests():
            raise RuntimeError(f"ucm: the loads of {len(failed)} requests have failed, and whoever wraps UCMConnector did "
                               "not ask for it: it must pass on get_transfer_results")
        return done

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return compat.transfer_results(*self._worker.transfers_done(), self._worker.failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_blocks()

    def build_connector_worker_meta(self) -> StepResult | None:
        return self._worker.result()

    # ---- both ----

    def get_kv_connector_stats(self) -> Stats | None:
        stats = self._meter.take()
        return stats if self._measured else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str],
                           per_engine_labelvalues: dict[int, list[object]]) -> PromMetrics:
        conf = config.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        return PromMetrics(Shown.read(conf.get("metrics_config_path")), vllm_config, metric_types, labelnames,
                           per_engine_labelvalues)

    def shutdown(self) -> None:
        (self._worker or self._scheduler).close()
        if self._traces:
            self._traces.close()


# MultiConnector finds the class by its name in the process that shows metrics, which imports this for them.
try:
    KVConnectorFactory.register_connector(UCMConnector.__name__, __name__, UCMConnector.__name__)
except ValueError:
    pass  # somebody else's of that name, as a wrapper of this one


def _wrapped(vllm_config: VllmConfig) -> bool:
    """vLLM knows another class in the place of this one, which may not pass on all calls."""
    return getattr(vllm_config.kv_transfer_config, "kv_connector_module_path", None) != __name__


def _aside(conf: ucm.Conf, vllm_config: VllmConfig, geometry: geo.Geometry) -> str:
    """Why requests wait aside until their blocks are there; "": loads stream into the step that computes on them.

    Who computes on a load that fails must be able to take back what came of it: to tell the other workers, to empty the
    engine's own cache of it, and to have vLLM compute it again.  And vLLM must know which engine blocks those are, and
    the model ask for every layer: a draft model's are asked for after the step has been reported.
    """
    recomputes = compat.failure_policy(vllm_config.kv_transfer_config) != "fail"
    reasons = {
        "use_layerwise is false": conf.get("use_layerwise") != "true",
        "before vLLM 0.23 what a failed load has left cannot be taken back": not compat.CAN_EVICT,
        "a wrapper of this connector may not pass all on": _wrapped(vllm_config),
        "sliding windows, or several KV cache groups": not geometry.plain,
        "a draft model": geo.drafts(vllm_config.speculative_config),
        "before vLLM 0.20 several workers do not hear of each other's failures":
            vllm_config.parallel_config.world_size > 1 and not compat.WORKERS_ANSWER,
        "with asynchronous scheduling, or its model runner V2, this vLLM computes a failed load again at the wrong "
        "place (kv_load_failure_policy \"fail\" does not)": recomputes and compat.runs_ahead(vllm_config),
    }
    return next((why for why, so in reasons.items() if so), "")


def _policy(conf: ucm.Conf, vllm_config: VllmConfig, geometry: geo.Geometry) -> Policy:
    role = vllm_config.kv_transfer_config.kv_role
    if any(geometry.windows) and _wrapped(vllm_config):
        raise geo.Unsupported(f"ucm serves sliding windows only where vLLM is given {__name__} itself: a wrapper may "
                              "not pass on vLLM's pool, which keeps what leaves a window while it is saved")
    lockstep = vllm_config.parallel_config.world_size > 1
    return Policy(
        loads=role != "kv_producer",
        saves=role != "kv_consumer",
        asynchronous=bool(_aside(conf, vllm_config, geometry)),
        recomputes=compat.failure_policy(vllm_config.kv_transfer_config) != "fail",
        delivers=role == "kv_producer",
        dram=conf.get("store_pipeline").startswith("Cache"),
        persist_token_threshold=int(conf.get("persist_token_threshold")),
        load_tokens_threshold=int(conf.get("load_tokens_threshold")),
        hit_ratio=float(conf.get("hit_ratio")),
        prompt_only=vllm_config.speculative_config is not None or conf.get("save_generated") != "true",
        lockstep=lockstep,
        hears=compat.WORKERS_ANSWER,
    )
