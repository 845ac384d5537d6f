# SPDX-License-Identifier: Apache-2.0
"""The zygote: imports vLLM, then forks a child for each life it is asked for (see zygote.py, which starts
this program and talks to it).  Before a fork nothing here starts threads, opens a store or computes.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the whole engine in the life's one process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "DeepseekV2ForCausalLM": "deepseek_v2",
                 "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

UCM = {"kv_connector": "UCMConnector", "kv_connector_module_path": "ucm.integration.vllm.ucm_connector"}
MULTI = {"kv_connector": "MultiConnector"}  # of several, given as "connectors"

MODULES = [  # what every engine imports sooner or later
    "vllm.distributed.kv_transfer.kv_connector.factory", "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base", "vllm.model_executor.model_loader",
    "vllm.v1.engine.core", "vllm.v1.engine.llm_engine", "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu_worker"]


def import_vllm() -> None:
    import contextlib
    import gc
    import importlib

    for name in MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # not every version has all
            importlib.import_module(name)
    from vllm import ModelRegistry

    # Registered as a class, an architecture is not inspected in a process of its own (15-40 s, once).
    for name, module in ARCHITECTURES.items():
        module = importlib.import_module(f"vllm.model_executor.models.{module}")
        ModelRegistry.register_model(name, getattr(module, name))
    gc.collect()
    gc.freeze()  # the children need not look through all this again


def settle_workers() -> None:
    """For engines with several ranks.  Their workers are forked too, instead of importing vLLM once more each.
    They talk by gloo, which sleeps, not by shared memory, where they spin: with fewer cores than threads that
    takes seconds a token.  And they warm up without a compiler too: stages of a pipeline need the buffers that
    are made then."""
    import multiprocessing

    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False
    CPUModelRunner.warming_up_model = CPUModelRunner.profile_run
    CPUWorker._should_warm_up_model = lambda _: True


class Engine:
    """A vLLM engine."""

    def __init__(self, model: Path, ucm: dict[str, Any] | None = None, role: str = "kv_both",
                 policy: str = "recompute", kv_events: str | None = None, **options: Any):
        from vllm import LLM
        from vllm.config import KVEventsConfig, KVTransferConfig

        if ucm is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                **(MULTI if "connectors" in ucm else UCM), kv_role=role, kv_load_failure_policy=policy,
                kv_connector_extra_config=ucm)
        if kv_events is not None:  # where they are published
            options["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, endpoint=kv_events)
        if options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1) > 1:
            settle_workers()
        self._answers: dict[str, list[int]] = {}
        self.llm = LLM(str(model), **{
            "dtype": "float32", "max_model_len": 16384, "enforce_eager": True, "skip_tokenizer_init": True,
            "enable_prefix_caching": False, "disable_log_stats": False, **options})

    def ask(self, prompts: list[list[int]], tokens: int = 8, salt: str | None = None,
            lora: Path | None = None) -> list[dict[str, Any]]:
        """Greedy answers; all prompts at once, each under the cache salt, by the adapter in that directory."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        extra = {} if salt is None else {"cache_salt": salt}
        adapter = None if lora is None else LoRARequest(lora.name, 1 + sum(lora.name.encode()), str(lora))
        answers = self.llm.generate([{"prompt_token_ids": p, **extra} for p in prompts], sampling, use_tqdm=False,
                                    lora_request=adapter)
        return [{"tokens": list(a.outputs[0].token_ids), "finish": a.outputs[0].finish_reason,
                 "ttft_s": a.metrics.first_token_latency, "cached": a.num_cached_tokens} for a in answers]

    def begin(self, name: str, prompt: list[int], tokens: int = 8) -> None:
        """A request that is computed by step() and waited for by finish()."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self, count: int) -> None:
        for _ in range(count):
            self._note(self.llm.llm_engine.step())

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def finish(self) -> dict[str, list[int]]:
        """The answers to all begun and not aborted."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step(1)
        answers, self._answers = self._answers, {}
        return answers

    def _note(self, outputs: list[Any]) -> None:
        for o in outputs:
            if o.finished:
                self._answers[o.request_id] = list(o.outputs[0].token_ids)

    def save(self) -> None:
        """Until the next lookup finds what ucm has been given to save (in an engine of one process)."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        for task, *_ in get_kv_transfer_group()._worker._saving:
            task.wait("stored", 60000)

    def reset(self, connector: bool) -> bool:
        """vLLM's own prefix cache, and what the connector has."""
        return self.llm.reset_prefix_cache(reset_connector=connector)

    def metrics(self) -> dict[str, float]:
        """vLLM's counters; the label that tells sources apart is part of the name."""
        out: dict[str, float] = {}
        for m in self.llm.get_metrics():
            if hasattr(m, "value"):
                source = m.labels.get("source")
                out[m.name + (f":{source}" if source else "")] = m.value
        return out

    def scrape(self) -> str:
        """What an API server in this process would show as /metrics."""
        import prometheus_client

        return prometheus_client.generate_latest().decode()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Maker:
    """Makes models."""

    def make(self, name: str, directory: Path, seed: int = 7) -> Path:
        import models

        return models.make(name, directory, seed)

    def make_eagle(self, model: Path, target: Path, seed: int) -> Path:
        import models

        return models.make_eagle(model, target, seed)

    def make_lora(self, model: Path, target: Path, seed: int) -> Path:
        import models

        return models.make_lora(model, target, seed)

    def make_tokenizer(self, target: Path) -> Path:
        import models

        return models.make_tokenizer(target)

    def close(self) -> None:
        pass


def live(pipe: Connection, log: str, environment: dict[str, str], what: str, args: tuple,
         kwargs: dict[str, Any]) -> None:
    """A child's whole life."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    begin = time.monotonic()
    target: Any = None
    request: Any = ("start", ())
    while request is not None:
        method, arguments = request
        try:
            if method == "start":
                target = {"Engine": Engine, "Maker": Maker}[what](*args, **kwargs)
                value: Any = time.monotonic() - begin
            else:
                value = getattr(target, method)(*arguments)
            pipe.send((True, value))
        except Exception as e:
            traceback.print_exc()
            pipe.send((False, f"{type(e).__name__}: {e}"))
        request = pipe.recv()
    if target is not None:
        target.close()
    pipe.send((True, None))


def receive(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = server.recv(size - len(data))
        if not part:
            sys.exit(0)  # whoever started us is gone
        data += part
    return data


def serve(server: socket.socket) -> None:
    server.sendall(b"ready")
    while True:
        order = pickle.loads(receive(server, int.from_bytes(receive(server, 4), "little")))
        _, (fd, *_), _, _ = socket.recv_fds(server, 1, 1)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            try:
                live(Connection(fd), *order)
            except (EOFError, BrokenPipeError):
                pass  # whoever asked for this life is gone
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.close(fd)
        server.sendall(str(pid).encode())


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    import_vllm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need no burying
    serve(socket.socket(fileno=int(sys.argv[1])))
