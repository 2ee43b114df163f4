"""Qwen3-MoE: what tests/engine does not have, a context extended by YaRN."""

from __future__ import annotations

from pathlib import Path

from small import SMALL, save
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def yarn(folder: Path) -> None:
    rope = dict(rope_type="yarn", rope_theta=5000.0, factor=8.0, original_max_position_embeddings=32)
    more = dict(
        intermediate_size=30, moe_intermediate_size=18, num_experts=9, num_experts_per_tok=3, norm_topk_prob=True,
        mlp_only_layers=[0], rope_parameters=rope,
    )  # fmt: skip
    save(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SMALL, **more})), folder)


MODELS = {"yarn": yarn}
