# SPDX-License-Identifier: Apache-2.0
"""Blocks of this model that this engine cannot load, since another kind of engine has stored them: said by name
instead of a hit rate of 0 that nobody can explain.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

logger = logging.getLogger(f"vllm.{__name__}")

# Of a namespace, what one engine has for all of its stages and groups.
FORM = ("dtype", "quantization", "kv_dtype", "block_tokens", "engine_block_tokens", "layout", "ranks", "tokens_over",
        "hash", "windows", "draft")
NAMESPACE = "namespace.json"
MISSES = 16  # after so many in a row it is time to look again


class Strangers:
    """Looks once at the start, and again while nothing is found.  Reads storage, which may hang, in a thread."""

    def __init__(self, backends: str, namespace: str):
        self._roots = [Path(backend) / "ucm" for backend in backends.split(":") if backend]
        self._own = json.loads(namespace)
        self._misses = 0
        self._thread: threading.Thread | None = None
        self._done = False
        self._look()

    def found(self, blocks: int) -> None:
        """What the lookup of a request that has a full block came to."""
        self._misses = 0 if blocks else self._misses + 1
        self._done = self._done or blocks > 0
        if self._misses % MISSES == MISSES - 1:
            self._look()

    def _look(self) -> None:
        if not self._done and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._tell, name="ucm-strangers", daemon=True)
            self._thread.start()

    def _tell(self) -> None:
        theirs = list(filter(None, map(identity_of, self._files())))
        if any(same_form(identity, self._own) for identity in theirs):
            return
        others = {text for identity in theirs if (text := differences(identity, self._own))}
        if others and not self._done:
            self._done = True
            logger.error("ucm: storage_backends hold blocks of this model in a form that this engine cannot load, and "
                         "none in its own. Stored by others with %s. Make what differs equal, or nothing of theirs "
                         "will be found", "; or with ".join(sorted(others)))

    def _files(self) -> list[Path]:
        """Of namespaces in which somebody has stored: a store that only looks makes the first file too."""
        return [folder / NAMESPACE for root in self._roots for folder in entries(root)
                if any(entry.name != NAMESPACE for entry in entries(folder))]


def entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def identity_of(file: Path) -> dict | None:
    try:
        identity = json.loads(json.loads(file.read_text())["namespace"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not an engine's, or half written
    return identity if isinstance(identity, dict) else None


def same_form(theirs: dict, own: dict) -> bool:
    return theirs.get("model") == own["model"] and all(theirs.get(key) == own.get(key) for key in FORM)


def differences(theirs: dict, own: dict) -> str:
    """"dtype torch.bfloat16 (here torch.float32), ..."; nothing for another model's."""
    if theirs.get("model") != own["model"]:
        return ""
    return ", ".join(f"{key} {theirs.get(key)} (here {own.get(key)})" for key in FORM if theirs.get(key) != own.get(key))
