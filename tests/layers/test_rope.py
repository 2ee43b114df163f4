"""Rotary embedding: every type against transformers' tables, both generations of keys, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from nonet.config.checkpoint import read_spec, refuse_unsupported
from nonet.errors import ModelError
from nonet.layers.rope import Rope, rope_of

CPU = torch.device("cpu")
WIDTH, LENGTH, THETA = 16, 512, 500.0
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "none": {},
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn of DeepSeek": YARN | {"beta_fast": 4, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn of equal weights": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn of GPT-OSS": YARN | {"truncate": False, "beta_fast": 8.0},
    "yarn with its factor of attention": YARN | {"attention_factor": 0.5},
    "yarn without its ramp": YARN | {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip
BASE = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": WIDTH, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "max_position_embeddings": LENGTH,
}  # fmt: skip


def older(scaling: dict) -> dict:
    """As released checkpoints have it: `rope_scaling` with `type`, theta beside it."""
    renamed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    return {"rope_theta": THETA, "rope_scaling": renamed or None}


def newer(scaling: dict) -> dict:
    return {"rope_parameters": {"rope_theta": THETA, **scaling}}


def spec_of(folder: Path, keys: dict):
    (folder / "config.json").write_text(json.dumps(BASE | keys))
    return read_spec(str(folder))


@pytest.mark.parametrize("keys", [older, newer])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_theirs(tmp_path, name, keys):
    spec = spec_of(tmp_path, keys(SCALINGS[name]))
    refuse_unsupported(spec)
    ours = rope_of(spec, WIDTH, LENGTH, torch.float32, CPU)
    scaling = {"rope_type": "default", **SCALINGS[name]}
    theirs = Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(
            hidden_size=32, num_attention_heads=2, head_dim=WIDTH, max_position_embeddings=LENGTH,
            rope_parameters={"rope_theta": THETA, **scaling},
        )
    )  # fmt: skip
    # by their frequencies, not their product of them with positions: a matrix product's float32 differs by the machine
    angle = torch.outer(torch.arange(LENGTH).double(), theirs.inv_freq.double())
    angle = torch.cat([angle, angle], dim=1)
    for found, wanted in zip(ours.at(torch.arange(LENGTH)), (angle.cos(), angle.sin()), strict=True):
        torch.testing.assert_close(found[:, 0].double(), wanted * theirs.attention_scaling, atol=5e-5, rtol=0)


def test_the_types_differ():
    """So the comparison above cannot hold by leaving the scaling out."""
    from nonet.layers.rope import frequencies

    kinds = ("default", "linear", "yarn", "llama3")
    tables = [frequencies(WIDTH, THETA, {"rope_type": "default", **SCALINGS[kind]})[0] for kind in kinds]
    assert all(not torch.allclose(a, b) for i, a in enumerate(tables) for b in tables[:i])
    assert frequencies(WIDTH, THETA, YARN)[1] > 1.2


def test_what_yarn_takes_from_elsewhere(tmp_path):
    """No factor: by how much the context grew. The original context may stand outside the mapping."""
    plain = {key: value for key, value in YARN.items() if key == "rope_type"}
    spec = spec_of(tmp_path, newer(plain | {"factor": None}) | {"original_max_position_embeddings": 64})
    wanted = rope_of(spec_of(tmp_path, newer(YARN)), WIDTH, LENGTH, torch.float32, CPU)
    every = torch.arange(LENGTH)
    assert torch.equal(rope_of(spec, WIDTH, LENGTH, torch.float32, CPU).at(every)[0], wanted.at(every)[0])


def test_without_tables_the_same():
    """Very long contexts have none, and no memory for them is taken."""
    position_T = torch.tensor([0, 5, 3, 40_000])
    long = Rope(WIDTH, 1e4, 10_000_000, torch.bfloat16, CPU)
    for found, wanted in zip(
        long.at(position_T), Rope(WIDTH, 1e4, 50_000, torch.bfloat16, CPU).at(position_T), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "supported: default, linear, yarn, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor = None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "8"}}, "rope_scaling.factor = '8'"),
        ({"rope_scaling": YARN | {"beta_fast": "fast"}}, "rope_scaling.beta_fast = 'fast'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor = None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "supported: one mapping for all layers"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, keys, message):
    spec = spec_of(tmp_path, keys)
    for check in (refuse_unsupported, lambda spec: rope_of(spec, WIDTH, LENGTH, torch.float32, CPU)):
        with pytest.raises(ModelError) as caught:
            check(spec)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
