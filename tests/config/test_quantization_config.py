"""config.json's quantization_config: DeepSeek's FP8 in blocks is taken, every other way is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nonet.config.checkpoint import fp8_block, read_spec, refuse_unsupported
from nonet.errors import ModelError

DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


def spec(folder: Path, quantization: object):
    (folder / "config.json").write_text(json.dumps(MODEL | {"quantization_config": quantization}))
    return read_spec(str(folder))


@pytest.mark.parametrize(
    ("quantization", "block"),
    [
        (None, None),
        ({}, None),
        (DEEPSEEK, 128),
        (DEEPSEEK | {"scale_fmt": "ue8m0", "ignored_layers": ["lm_head"], "modules_to_not_convert": None}, 128),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, 64),
    ],
)
def test_taken(tmp_path, quantization, block):
    found = spec(tmp_path, quantization)
    refuse_unsupported(found)
    assert fp8_block(tmp_path / "config.json", found.raw) == block


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            "fp8",
            "quantization_config = 'fp8' is not supported; supported: weights in float32, bfloat16, float16, or in",
        ),
        ({"quant_method": "awq"}, "quantization_config.quant_method = 'awq' is not supported; supported: weights in"),
        ({"quant_method": "mxfp4"}, "'mxfp4' .*; save it in bfloat16 first"),
        ({"bits": 4}, "quantization_config.quant_method = None"),
        (DEEPSEEK | {"fmt": "e5m2"}, "quantization_config.fmt = 'e5m2' is not supported; supported: e4m3"),
        (DEEPSEEK | {"activation_scheme": "static"}, "activation_scheme = 'static' .* supported: dynamic"),
        (DEEPSEEK | {"weight_block_size": None}, "weight_block_size = None .* supported: \\[128, 128\\]"),
        (DEEPSEEK | {"weight_block_size": [128, 64]}, "weight_block_size = \\[128, 64\\]"),
        (DEEPSEEK | {"weight_block_size": [128]}, "weight_block_size = \\[128\\]"),
        (DEEPSEEK | {"weight_block_size": [0, 0]}, "weight_block_size = \\[0, 0\\]"),
        (DEEPSEEK | {"weight_block_size": ["128", "128"]}, "weight_block_size = \\['128', '128'\\]"),
    ],
)
def test_refused(tmp_path, quantization, message):
    with pytest.raises(ModelError, match=message) as caught:
        refuse_unsupported(spec(tmp_path, quantization))
    assert "\n" not in str(caught.value)
