# SPDX-License-Identifier: Apache-2.0
"""One version of vLLM as far as a KV connector sees it, without the rest: the modules that a connector stands
on are the version's own, every other one has the version's names and nothing behind them.  So neither torch
nor a compiled vLLM is needed; a name that the version has not cannot be imported here either.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from source import Source

V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
REAL = {f"{V1}.base", f"{V1}.metrics", "vllm.v1.outputs", "vllm.v1.kv_cache_interface", "vllm.v1.kv_cache_layout",
        "vllm.v1.kv_cache_spec_registry", "vllm.v1.core.sched.output", "vllm.v1.metrics.cache_hit_source",
        "vllm.utils.math_utils", "vllm.distributed.kv_events",
        "vllm.v1.attention.backends.cpu_attn", "vllm.v1.attention.backends.triton_attn",
        "vllm.v1.kv_offload.base", "vllm.v1.kv_offload.config",
        "vllm.v1.kv_offload.file_mapper", "vllm.v1.kv_offload.tiering.base",
        "vllm_ascend.distributed.kv_transfer.kv_pool.ucm_connector"}
OTHERS = ("torch", "prometheus_client", "typing_extensions")  # never the real ones
# What is used of modules that are not real, where anything will not do.
GIVEN = {"typing_extensions": {"override": lambda method: method},
         "vllm.utils.torch_utils": {"get_dtype_size": lambda dtype: 4},
         "vllm.v1.attention.backends.utils": {"get_kv_cache_layout": lambda: "HND"},
         "vllm.v1.core.kv_cache_utils": {"DEFAULT_NONE_HASH_SEED": "a fixed one",
                                         "maybe_convert_block_hash": lambda block_hash: block_hash}}


class Anything:
    """Stands for what nobody looks at."""

    def __init__(self, name: str = "anything"):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Anything(f"{self._name}()")

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __getitem__ = __or__

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()

    def __repr__(self) -> str:
        return f"<{self._name}>"


class Empty(ModuleType):
    """A module with names only.  names: those there are, or None: any."""

    def __init__(self, name: str, names: set[str] | None, given: dict[str, Any]):
        super().__init__(name)
        self.__path__: list[str] = []
        self._names = names
        self.__dict__.update({k: v for k, v in given.items() if names is None or k in names})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (self._names is not None and name not in self._names):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return Anything(f"{self.__name__}.{name}")


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines at its top level, also under if and try."""
    found: set[str] = set()
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.If, ast.Try)):
            todo += node.body + node.orelse
            todo += [s for h in getattr(node, "handlers", []) for s in h.body]
    return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, source: Source):
        self._source = source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        root = name.split(".")[0]
        if root in ("vllm", "vllm_ascend"):
            if self._source.path(name) is None and not self._source.is_package(name):
                return None
        elif root not in OTHERS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType | None:
        name = spec.name
        if name in REAL:
            return None
        path = self._source.path(name)
        # A package may hold modules besides: any name.
        names = None if path is None or path.endswith("__init__.py") else names_of(self._source.tree(path))
        return Empty(name, names, GIVEN.get(name, {}))

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in REAL:
            path = self._source.path(module.__name__)
            exec(compile(self._source.text(path), path, "exec"), module.__dict__)


def install(source: Source) -> None:
    """From here on this process has that vLLM.  Not undone: for a process of its own."""
    stale = [n for n in sys.modules if n.split(".")[0] in ("vllm", *OTHERS) or n.startswith("ucm.integration")]
    for name in stale:
        del sys.modules[name]
    sys.meta_path.insert(0, Finder(source))


def run(archives: list[Path], work: Callable, *args: Any) -> Any:
    """What work(*args) returns in a process that has that vLLM."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, archives, work, args))
    child.start()
    theirs.close()
    try:
        good, value = ours.recv()
    except EOFError:
        good, value = False, "the process died"
    child.join()
    assert good, value
    return value


def _child(pipe: Any, archives: list[Path], work: Callable, args: tuple) -> None:
    try:
        install(Source(*archives))
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
