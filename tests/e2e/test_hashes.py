# SPDX-License-Identifier: Apache-2.0
"""Blocks are named by vLLM's own hashes of its own requests: what these tell apart, ucm tells apart."""

from __future__ import annotations

import pytest
from models import prompt
from support import BLOCK, ENGINE

PROMPT = prompt(5 * BLOCK, 1)
IMAGE = (2 * BLOCK + 10, 60)  # where its placeholders lie, all in the third block: place, tokens


@pytest.fixture
def keys():
    """keys(image=..., salt=..., adapter=...): what the blocks of PROMPT are called."""
    from test_bookkeeping import Scheduler
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    side = Scheduler().side

    def name(image: str | None = None, salt: str | None = None, adapter: str | None = None) -> list[bytes]:
        features = [MultiModalFeatureSpec(data=None, modality="image", identifier=image,
                                          mm_position=PlaceholderRange(*IMAGE))] if image else None
        request = Request("a", PROMPT, SamplingParams(max_tokens=1), None, mm_features=features, cache_salt=salt,
                          lora_request=LoRARequest(adapter, 1, "/nowhere") if adapter else None,
                          block_hasher=get_request_block_hasher(ENGINE, sha256))
        keys = side.prompt_keys(request)
        return [keys[i:i + 16] for i in range(0, len(keys), 16)]

    return name


def test_the_same_request_has_the_same_names(keys):
    assert keys(image="cat") == keys(image="cat") and len(set(keys())) == 5


def test_another_image_is_another_prompt_from_there_on(keys):
    cat, dog, none = keys(image="cat"), keys(image="dog"), keys()
    assert cat[:2] == dog[:2] == none[:2]
    assert all(len({*three}) == 3 for three in zip(cat[2:], dog[2:], none[2:]))


@pytest.mark.parametrize("who", ["salt", "adapter"])
def test_another_salt_or_adapter_is_another_prompt_from_the_start(keys, who):
    one, two, none = keys(**{who: "one"}), keys(**{who: "two"}), keys()
    assert all(len({*three}) == 3 for three in zip(one, two, none))
