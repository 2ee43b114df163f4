"""Attention layers with Triton's kernels against the plain forms: on a GPU, or on CPU tensors in the interpreter.

Run by test_attention_triton.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from nonet.engine.batch import BatchBuilder
from nonet.engine.messages import StepBatch
from nonet.kernels.triton import INTERPRETED
from nonet.layers.attention import Attention
from nonet.layers.mla import LatentAttention, LatentShape
from nonet.layers.rope import Rope
from nonet.weights.loader import Checkpoint

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HIDDEN, HEADS, BLOCK = 32, 4, 4
# each step's (sequence, tokens before, new tokens), decoding ones first
STEPS = [[(0, 0, 13), (1, 0, 5)], [(0, 13, 1), (1, 5, 9), (2, 0, 17)], [(1, 14, 1), (0, 14, 1), (2, 17, 3)]]
LATENT = LatentShape(HIDDEN, 24, 16, 8, 4, 12, 0.3, interleaved=True)
GROUPED = {"window": {"window": 6, "sinks": True}, "normed": {"norm_eps": 1e-6, "chunk": 8, "scale": 0.4}}


@pytest.fixture
def checkpoint(tmp_path):
    """Random weights for both kinds of layer."""
    c, n, r, v = LATENT.kv_lora_rank, LATENT.nope, LATENT.rope, LATENT.value
    shapes = {
        "q_a_proj.weight": (24, HIDDEN), "q_a_layernorm.weight": (24,), "q_b_proj.weight": (HEADS * (n + r), 24),
        "kv_a_proj_with_mqa.weight": (c + r, HIDDEN), "kv_a_layernorm.weight": (c,),
        "kv_b_proj.weight": (HEADS * (n + v), c), "q_proj.weight": (HEADS * 16, HIDDEN),
        "k_proj.weight": (2 * 16, HIDDEN), "v_proj.weight": (2 * 16, HIDDEN), "sinks": (HEADS,),
        "q_norm.weight": (16,), "k_norm.weight": (16,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    files = {f"x.{name}": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    for name, outputs in (("latent", HEADS * v), ("grouped", HEADS * 16)):
        folder = tmp_path / name
        folder.mkdir()
        out = torch.randn((HIDDEN, outputs), generator=generator) * 0.4
        save_file({**files, "x.o_proj.weight": out}, folder / "model.safetensors")
    return lambda name: Checkpoint(tmp_path / name, torch.float32, DEVICE)


def run(layer, cache: tuple[torch.Tensor, ...], rope: Rope, backend: str) -> torch.Tensor:
    """All steps' results, of three sequences in blocks in no order; the cache is no number at first."""
    blocks = [[9, 1, 6, 3, 12], [0, 8, 2, 11, 4], [5, 7, 13, 10, 14]]
    x_SPD = torch.randn((3, 20, HIDDEN), generator=torch.Generator().manual_seed(2))
    builder, out = BatchBuilder(BLOCK, 0, 1, DEVICE, backend), []
    for step in STEPS:
        tokens = sum(count for *_, count in step)
        batch = StepBatch(
            tokens=[0] * tokens,
            starts=[start for _, start, _ in step],
            counts=[count for *_, count in step],
            blocks=[blocks[own] for own, *_ in step],
        )
        built = builder.build(batch, [tokens])
        x_TD = torch.cat([x_SPD[own, start : start + count] for own, start, count in step]).to(DEVICE)
        out.append(layer.forward(x_TD, rope.at(built.position_T), cache, built.attention))
    assert [first for first, _ in pairwise([len(y) for y in out])] == [18, 27]
    return torch.cat(out)


def check(layer, parts: int, heads: int, width: int, rope: Rope) -> None:
    shape = parts, 16 * BLOCK, heads, width
    results = []
    for backend in ("reference", "triton"):
        cache = torch.full(shape, torch.nan, device=DEVICE).unbind()
        results.append(run(layer, cache, rope, backend))
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries(checkpoint, name):
    layer = Attention(checkpoint("grouped"), "x", heads=(0, 4), kv_heads=(0, 2), head_dim=16, **GROUPED[name])
    check(layer, 2, 2, 16, Rope(16, 500.0, 64, torch.float32, DEVICE))


@pytest.mark.parametrize(
    ("form", "most"), [("plain", 1), ("plain", 20 * HEADS * 20), ("either", 1 << 27), ("absorbed", 1 << 27)]
)
def test_latents(checkpoint, monkeypatch, form, most):
    """Prompts in either form, some at a time or all at once."""
    cheaper = {"plain": lambda part: True, "absorbed": lambda part: False, "either": lambda part: part.count != 9}[form]
    monkeypatch.setattr("nonet.layers.mla.MOST_MADE", most)
    layer = LatentAttention(checkpoint("latent"), "x", heads=(0, HEADS), shape=LATENT)
    monkeypatch.setattr(layer, "_plain_is_cheaper", cheaper)
    check(layer, 1, 1, 20, Rope(4, 500.0, 64, torch.float32, DEVICE))
