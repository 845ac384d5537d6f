# SPDX-License-Identifier: Apache-2.0
"""Where and how one version of vLLM calls a connector, or a tier: read off its source."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from typing import Any

from source import Source

# Those who call: the engine, and the connector that holds several others.
CALLERS = re.compile(r"vllm/(v1/(core|engine|worker|executor|attention)/|model_executor/layers/attention/|attention/|"
                     r"distributed/kv_transfer/kv_transfer_state\.py|.*/kv_connector/(utils|factory)\.py|"
                     r".*/kv_connector/v1/(base|multi_connector)\.py)")
RECEIVER = re.compile(r"(?<!ec_)(?<!aux_output_)(connector|\bc|get_kv_transfer_group\(\)|connector_cls|\bself)$")
CONNECTOR = CALLERS, RECEIVER
TIER = re.compile(r"vllm/v1/kv_offload/tiering/manager\.py"), re.compile(r"\btier$")


@dataclass(frozen=True)
class Call:
    hook: str
    where: str  # file:line
    positional: int
    keywords: tuple[str, ...]
    starred: bool  # passes *args or **kwargs on: these are not known
    unpacked: int  # how many values the caller takes out of the result; 0: whole

    def fits(self, signature: inspect.Signature, bound: bool) -> bool:
        """bound: the first parameter is passed by Python itself."""
        bind = signature.bind_partial if self.starred else signature.bind
        try:
            bind(*[None] * (self.positional + bound), **dict.fromkeys(self.keywords))
        except TypeError:
            return False
        return True


def find(source: Source, hooks: set[str], whose: tuple = CONNECTOR) -> list[Call]:
    callers, receiver = whose
    found = []
    for path in filter(callers.match, source.files()):
        if not any(hook in source.text(path) for hook in hooks):
            continue
        tree = source.tree(path)
        unpacked = {id(n.value): len(n.targets[0].elts) for n in ast.walk(tree)
                    if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple)}
        found += [_call(n, path, unpacked.get(id(n), 0)) for n in ast.walk(tree)
                  if _calls(n, hooks, path, receiver)]
    return found


def _calls(node: ast.AST, hooks: set[str], path: str, receiver: re.Pattern) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in hooks):
        return False
    match = receiver.search(ast.unparse(node.func.value))
    return bool(match) and (match[0] != "self" or path.endswith("v1/base.py"))


def _call(node: Any, path: str, unpacked: int) -> Call:
    return Call(node.func.attr, f"{path}:{node.lineno}",
                sum(not isinstance(a, ast.Starred) for a in node.args),
                tuple(k.arg for k in node.keywords if k.arg),
                any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords),
                unpacked)


def signatures(cls: type) -> dict[str, tuple[inspect.Signature, bool] | None]:
    """Of all that is public: its signature and whether Python itself passes the first parameter; None: no
    function."""
    found: dict[str, Any] = {}
    for name in dir(cls):
        what = inspect.getattr_static(cls, name)
        function = getattr(what, "__func__", what)
        if not name.startswith("_"):
            found[name] = (inspect.signature(function), not isinstance(what, staticmethod)) \
                if inspect.isfunction(function) else None
    return found
