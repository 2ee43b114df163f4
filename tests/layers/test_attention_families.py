"""Attention with what Llama 4 and gpt-oss add to it against transformers' modules, in chunks and split over ranks."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Paged
from safetensors.torch import save_file
from transformers import GptOssConfig, Llama4TextConfig
from transformers.models.gpt_oss import modeling_gpt_oss as gpt
from transformers.models.llama4 import modeling_llama4 as llama

from nonet.layers.attention import Attention, Temperature
from nonet.layers.rope import Rope
from nonet.weights.loader import Checkpoint

CPU = torch.device("cpu")
HIDDEN, LENGTH, HEADS, KV_HEADS, WIDTH, THETA, EPS = 20, 19, 4, 2, 6, 500.0, 1e-3
SHAPE = dict(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH, rms_norm_eps=EPS,
    num_hidden_layers=2, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": THETA},
)  # fmt: skip
CHUNKS = [[19], [1] * 19, [5, 1, 7, 6], [8, 8, 3], [4, 1, 14]]  # one token takes the decoding path


def llama4(turned: bool) -> tuple[torch.nn.Module, object, dict[str, object]]:
    """(their module, their angles of some rows, our options): a layer with rope in chunks, or one without."""
    cfg = Llama4TextConfig(
        **SHAPE, no_rope_layers=[int(turned)] * 2, attention_chunk_size=7, use_qk_norm=True, attention_bias=True,
        attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5,
    )  # fmt: skip
    cfg._attn_implementation = "eager"
    angles = llama.Llama4TextRotaryEmbedding(cfg)
    ours: dict[str, object] = dict(rope=turned, interleaved=True, norm_weights=False)
    ours |= dict(norm_eps=EPS, chunk=7) if turned else dict(temperature=Temperature(4, 0.5))
    return llama.Llama4TextAttention(cfg, 0), angles, ours


def gpt_oss(sliding: bool) -> tuple[torch.nn.Module, object, dict[str, object]]:
    kind = "sliding_attention" if sliding else "full_attention"
    cfg = GptOssConfig(**SHAPE, layer_types=[kind] * 2, sliding_window=5)
    cfg._attn_implementation = "eager"
    ours = dict(sinks=True, window=5 if sliding else None)
    return gpt.GptOssAttention(cfg, 0), gpt.GptOssRotaryEmbedding(cfg), ours


KINDS = {
    "llama4-chunks": lambda: llama4(True),
    "llama4-no-positions": lambda: llama4(False),
    "gpt_oss-window": lambda: gpt_oss(True),
    "gpt_oss-full": lambda: gpt_oss(False),
}


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """(our options, the module's checkpoint, inputs, transformers' outputs)"""
    module, angles, ours = KINDS[request.param]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    save_file({f"x.{k}": v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "model.safetensors")
    x_TD = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))
    q, c = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = c <= q
    if "window" in ours and ours["window"]:
        seen &= c > q - ours["window"]
    if "chunk" in ours:
        seen &= c // ours["chunk"] == q // ours["chunk"]
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, -torch.inf)[None, None]
    with torch.no_grad():
        wanted = module.eval()(x_TD[None], angles(x_TD[None], torch.arange(LENGTH)[None]), mask)[0][0]
    return ours, Checkpoint(tmp_path, torch.float32, CPU), x_TD, wanted


def run(case, chunks: list[int], rank: int = 0, tp: int = 1) -> torch.Tensor:
    """One rank's part of the sum over heads, the sequence in chunks."""
    options, files, x_TD, _ = case
    own, own_kv = HEADS // tp, max(1, KV_HEADS // tp)
    first_kv = rank * KV_HEADS // tp
    layer = Attention(
        files, "x", heads=(rank * own, (rank + 1) * own), kv_heads=(first_kv, first_kv + own_kv), head_dim=WIDTH,
        **options,
    )  # fmt: skip
    paged = Paged(num_blocks=20, block_size=3)
    rope, blocks = Rope(WIDTH, THETA, 64, torch.float32, CPU), paged.take(LENGTH)
    cache = tuple(torch.zeros(paged.places, own_kv, WIDTH) for _ in range(2))
    out, start = [], 0
    for count in chunks:
        batch = paged.batch([(blocks, start, count)])
        rows = x_TD[start : start + count]
        out.append(layer.forward(rows, rope.at(batch.position_T), cache, batch.attention))
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_a_sequence_in_any_chunks_is_theirs(case, chunks):
    torch.testing.assert_close(run(case, chunks), case[3], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tp", [2, 4])
def test_the_parts_of_the_ranks_add_up(case, tp):
    """Sinks, biases and norms too; with 4 ranks neighbours hold the same KV head."""
    total = sum(run(case, [12, 1, 6], rank, tp) for rank in range(tp))
    torch.testing.assert_close(total, case[3], atol=2e-5, rtol=2e-5)
