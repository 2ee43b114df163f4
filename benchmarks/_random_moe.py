"""A small random Mixture-of-Experts model in Hugging Face form, for the benchmarks of this folder.

Qwen3-MoE layout: config.json, model.safetensors and a formal tokenizer (the benchmarks send token ids).
`SHAPE` has 61.4 million parameters, and 32 experts of which each token takes 4. Weights are normal(0, 0.02),
norms 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,  # of a dense layer; there is none, but readers want the key
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def config() -> dict[str, Any]:
    """The model's config.json, with the keys of both generations, as rope_theta and rope_parameters."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **SHAPE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "use_cache": True,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its released (per-expert) name."""
    d, head, vocab = SHAPE["hidden_size"], SHAPE["head_dim"], SHAPE["vocab_size"]
    q, kv = SHAPE["num_attention_heads"] * head, SHAPE["num_key_value_heads"] * head
    inner = SHAPE["moe_intermediate_size"]
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (vocab, d),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = out[f"{at}.post_attention_layernorm.weight"] = (d,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            out[f"{at}.self_attn.{name}_proj.weight"] = (rows, d)
        out[f"{at}.self_attn.o_proj.weight"] = (d, q)
        out[f"{at}.self_attn.q_norm.weight"] = out[f"{at}.self_attn.k_norm.weight"] = (head,)
        out[f"{at}.mlp.gate.weight"] = (SHAPE["num_experts"], d)
        for expert in range(SHAPE["num_experts"]):
            out[f"{at}.mlp.experts.{expert}.gate_proj.weight"] = (inner, d)
            out[f"{at}.mlp.experts.{expert}.up_proj.weight"] = (inner, d)
            out[f"{at}.mlp.experts.{expert}.down_proj.weight"] = (d, inner)
    return out


def write_tokenizer(folder: Path) -> None:
    """One word a token id, `t17`: never used to encode, but both engines want a tokenizer to load."""
    special = ["<bos>", "<eos>", "<pad>"]
    words = special + [f"t{i}" for i in range(len(special), SHAPE["vocab_size"])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<pad>",
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<pad>",
        "model_max_length": SHAPE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


def write_model(folder: Path, seed: int = 0) -> int:
    """Writes the model into `folder` and returns its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.randn(shape, generator=random).mul_(0.02).to(torch.bfloat16)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(), indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    write_tokenizer(folder)
    return sum(t.numel() for t in tensors.values())
