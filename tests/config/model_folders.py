"""Model folders with nothing but a config.json, for tests of reading and resolving configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 22,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 7,
}


def write_model(folder: Path, without: tuple[str, ...] = (), **changes: Any) -> str:
    """A folder with SMALL's config.json, some keys changed, others left out. A new folder for each call."""
    path = folder / f"model{len(list(folder.iterdir()))}"
    path.mkdir()
    config = {key: value for key, value in {**SMALL, **changes}.items() if key not in without}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)
