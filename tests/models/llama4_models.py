"""Llama 4's text part: chunked attention beside layers without positions, experts in every layer or every other one."""

from __future__ import annotations

from pathlib import Path

from small import SMALL, save
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

COMMON = dict(intermediate_size=22, intermediate_size_mlp=34, num_experts_per_tok=1, attention_chunk_size=12,
              floor_scale=8, attn_scale=0.8, attn_temperature_tuning=True)  # fmt: skip


def scout(folder: Path) -> None:
    """Experts in every layer, the second without positions, q and k normed, a context extended by Llama 3's rule."""
    rope = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)  # fmt: skip
    more = dict(num_local_experts=6, no_rope_layers=[1, 0, 1], use_qk_norm=True, rope_parameters=rope)
    save(lambda: Llama4ForCausalLM(Llama4TextConfig(**{**SMALL, **COMMON, **more})), folder)


def maverick(folder: Path) -> None:
    """Experts in every other layer, no norms of q and k, biases, no tuning by position, one KV head."""
    more = dict(
        num_hidden_layers=4, num_local_experts=9, interleave_moe_layer_step=2, no_rope_layer_interval=3,
        use_qk_norm=False, attn_temperature_tuning=False, attention_bias=True, num_key_value_heads=1,
    )  # fmt: skip
    save(lambda: Llama4ForCausalLM(Llama4TextConfig(**{**SMALL, **COMMON, **more})), folder)


def images(folder: Path) -> None:
    """A model that also sees, as released: what it reads text with stands in `text_config` and behind a prefix."""
    text = {**SMALL, **COMMON, "num_local_experts": 5, "num_hidden_layers": 4, "model_type": "llama4_text"}
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vision_output_dim=16,
        image_size=28, patch_size=14, projector_input_dim=16, projector_output_dim=16,
    )  # fmt: skip
    save(lambda: Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)), folder)


MODELS = {"scout": scout, "maverick": maverick, "images": images}
