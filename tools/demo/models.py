# SPDX-License-Identifier: Apache-2.0
"""Small random models, made locally with fixed seeds: no download; prompts are token ids."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from pathlib import Path

VOCABULARY = 4096
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
          "max_position_embeddings": 32768, "tie_word_embeddings": False}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
MODELS = {
    # 75 M parameters: a prompt of 6000 tokens costs seconds on two cores
    "llama-75m": ("LlamaConfig", {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 10,
                                  "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}),
    "llama-tiny": ("LlamaConfig", {**TINY, "num_attention_heads": 8, "num_key_value_heads": 4,
                                   "head_dim": 32}),
    "qwen2-tiny": ("Qwen2Config", {**TINY, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen3-tiny": ("Qwen3Config", {**TINY, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}),
    # multi-head latent attention
    "mla-tiny": ("DeepseekV2Config", {
        **TINY, "moe_intermediate_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}),
    # full and sliding-window attention, in turn: two KV cache groups of two layers
    "gemma2-tiny": ("Gemma2Config", {**TINY, "num_attention_heads": 8, "num_key_value_heads": 4,
                                     "head_dim": 64, "sliding_window": 256, "tie_word_embeddings": True}),
    # two of full attention, five of a window: four groups, of which the last has a layer less
    "gemma3-tiny": ("Gemma3TextConfig", {
        **TINY, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "query_pre_attn_scalar": 64, "sliding_window": 128, "tie_word_embeddings": True,
        "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2 + ["sliding_attention"]}),
}


def make(name: str, directory: Path, seed: int = 7) -> Path:
    """Writes the model, unless it is there already; returns its directory.  Several may do so at once."""
    target = directory / (name if seed == 7 else f"{name}-{seed}")
    if target.exists():
        return target
    import torch
    import transformers

    class_name, values = MODELS[name]
    config = getattr(transformers, class_name)(**{**COMMON, **values})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # A wide spread keeps the largest logit well apart from the second.
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.05, generator=generator)
            else:
                parameter.fill_(0.0 if "gemma" in name or parameter_name.endswith("bias") else 1.0)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, ignore_cleanup_errors=True) as new:
        model.to(torch.bfloat16).save_pretrained(new, safe_serialization=True)
        Path(new, "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
        with contextlib.suppress(OSError):  # another was faster
            os.rename(new, target)
    return target


def make_eagle(model: Path, target: Path, seed: int) -> Path:
    """Writes an EAGLE head, one layer, for a llama made here; returns its directory."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    layer = {k.removeprefix("model."): v for k, v in load_file(model / "model.safetensors").items()
             if k.startswith("model.layers.0.") and "input_layernorm" not in k}
    width = config["hidden_size"]
    target.mkdir()
    save_file({**layer, "fc.weight": torch.empty(width, 2 * width).normal_(0, 0.05, generator=generator)},
              target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return target


def make_lora(model: Path, target: Path, seed: int) -> Path:
    """Writes an adapter of rank 8 for a model made here; returns its directory."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    width, head = config["hidden_size"], config["head_dim"]
    heads = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, count in heads.items():
            for part, shape in (("A", (8, width)), ("B", (count * head, 8))):
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight"] = (
                    torch.empty(shape).normal_(0, 0.2, generator=generator))
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": list(heads),
        "bias": "none", "base_model_name_or_path": ""}))
    return target


def make_tokenizer(target: Path) -> Path:
    """Writes a tokenizer that has a word for each token, for programs that speak text; returns its directory."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = [*special.values(), *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(target)
    return target


def prompt(tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCABULARY) for _ in range(tokens)]
