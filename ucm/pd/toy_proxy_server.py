# SPDX-License-Identifier: Apache-2.0
"""Starts ucm-proxy with the arguments given: `python3 toy_proxy_server.py --help` lists them.

Needs nothing but the standard library, and neither ucm nor vLLM to be importable.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

PROGRAM = "ucm-proxy"


def places() -> list[Path]:
    """Where it may be: what UCM_PROXY names, beside this Python, in the user's scheme, in a source tree's build."""
    named = [Path(os.environ["UCM_PROXY"])] if os.environ.get("UCM_PROXY") else []
    schemes = [None, sysconfig.get_preferred_scheme("user")]
    scripts = [Path(sysconfig.get_path("scripts", s) if s else sysconfig.get_path("scripts")) for s in schemes]
    built = Path(__file__).resolve().parents[2] / "build" / "tools"
    return named or [d / PROGRAM for d in (Path(sys.executable).parent, *scripts, built)]


def find() -> str | None:
    found = next((str(p) for p in places() if p.is_file() and os.access(p, os.X_OK)), None)
    return found or (None if os.environ.get("UCM_PROXY") else shutil.which(PROGRAM))


def main() -> None:
    program = find()
    if program is None:
        looked = "".join(f"\n  {p}" for p in dict.fromkeys(places()))
        sys.exit(f"{PROGRAM} is not installed; `pip install .` or `make` in ucm's tree makes it.  Looked for it in:"
                 f"{looked}\n  and in PATH; UCM_PROXY=/its/path names another place.")
    os.execv(program, [program, *sys.argv[1:]])


if __name__ == "__main__":
    main()
