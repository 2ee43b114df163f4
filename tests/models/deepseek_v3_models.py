"""DeepSeek: V3 as released checkpoints describe it, and V2-Lite as transformers 5 does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import SMALL, save
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

LATENT = dict(num_key_value_heads=4, kv_lora_rank=20, qk_rope_head_dim=6, head_dim=6, qk_nope_head_dim=10,
              intermediate_size=34, moe_intermediate_size=14)  # fmt: skip
YARN = dict(rope_theta=5000.0, factor=8.0, beta_fast=32, beta_slow=1, mscale=0.8, mscale_all_dim=1.0,
            original_max_position_embeddings=32)  # fmt: skip


def v3(folder: Path) -> None:
    """Groups, correction bias, YaRN with both weights, a latent for queries, biases, a dense layer at first; beside it
    a layer for multi-token prediction that nobody is to read."""
    more = dict(
        v_head_dim=12, q_lora_rank=18, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2,
        first_k_dense_replace=1, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        attention_bias=True, num_nextn_predict_layers=1, rope_parameters={"rope_type": "yarn", **YARN},
    )  # fmt: skip

    def build() -> DeepseekV3ForCausalLM:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SMALL, **LATENT, **more}))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.uniform_(-0.3, 0.3)
        return model

    save(build, folder)
    weights = load_file(folder / "model.safetensors")
    assert sum("e_score_correction_bias" in name for name in weights) == 2
    weights["model.layers.3.eh_proj.weight"] = torch.full((48, 96), torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    scaling = {"type": "yarn", **{key: value for key, value in YARN.items() if key != "rope_theta"}}
    config |= {"rope_theta": theta, "rope_scaling": scaling, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    path.write_text(json.dumps(config))


def v2_lite(folder: Path) -> None:
    """Softmax over all experts, queries made of the hidden row, values wider than keys, a dense layer at first."""
    more = dict(
        v_head_dim=18, q_lora_rank=None, n_routed_experts=7, num_experts_per_tok=3, n_shared_experts=2,
        first_k_dense_replace=1, routed_scaling_factor=1.0, norm_topk_prob=False, topk_method="greedy",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    save(lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**{**SMALL, **LATENT, **more})), folder)


MODELS = {"v3": v3, "v2_lite": v2_lite}
