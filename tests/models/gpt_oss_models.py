"""gpt-oss: sinks, sliding windows in every other layer, biases everywhere, the clamped activation, YaRN."""

from __future__ import annotations

from pathlib import Path

from small import SMALL, save
from transformers import GptOssConfig, GptOssForCausalLM


def yarn(folder: Path) -> None:
    rope = dict(rope_type="yarn", rope_theta=5000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=32)  # fmt: skip
    more = dict(intermediate_size=22, num_local_experts=7, num_experts_per_tok=3, sliding_window=10,
                rope_parameters=rope)  # fmt: skip

    def build() -> GptOssForCausalLM:
        model = GptOssForCausalLM(GptOssConfig(**{**SMALL, **more}))
        for layer in model.model.layers:  # so that what goes into the activation is clamped now and then
            layer.mlp.experts.gate_up_proj.data *= 3
        return model

    save(build, folder)


MODELS = {"yarn": yarn}
