# SPDX-License-Identifier: Apache-2.0
"""What the tests of prefill and decode apart have in common."""

from __future__ import annotations

import sys
from pathlib import Path

TOKENS, BLOCK = 8, 128
OPTIONS = ("--skip-tokenizer-init", "--max-model-len", "4096")
PROXY = [sys.executable, Path(__file__).resolve().parents[2] / "ucm" / "pd" / "toy_proxy_server.py"]
