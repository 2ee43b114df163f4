"""gpt-oss: sinks, sliding windows in every other layer, biases everywhere, the clamped activation, YaRN."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import SMALL, save
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config


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


def released(folder: Path) -> None:
    """As docs/models.md makes it of a released checkpoint, whose experts are in MXFP4: blocks of 32 numbers of 4 bits,
    with an exponent each. In bfloat16."""
    E, D, width = 5, 64, 32
    more = dict(
        hidden_size=D, intermediate_size=width, num_local_experts=E, num_experts_per_tok=2, sliding_window=10,
        num_hidden_layers=2,
    )  # fmt: skip
    save(lambda: GptOssForCausalLM(GptOssConfig(**{**SMALL, **more})), folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        _, inputs, outputs = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(256, (E, outputs, inputs // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(122, 126, (E, outputs, inputs // 32), dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"modules_to_not_convert": plain, "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    to_plain = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=to_plain, dtype="bfloat16")
    for path in folder.iterdir():
        path.unlink()
    model.save_pretrained(folder, save_original_format=False)
    (folder / "generation_config.json").unlink(missing_ok=True)


MODELS = {"yarn": yarn, "released": released}
