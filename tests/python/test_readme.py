# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples(code, tmp_path):
    small = f'"{tmp_path}", "cache_buffer_capacity_gb": 0.1, "posix_segment_mb": 8'
    assert '"/mnt/kv"' in code
    exec(code.replace('"/mnt/kv"', small), {})


def test_there_is_one():
    assert EXAMPLES
