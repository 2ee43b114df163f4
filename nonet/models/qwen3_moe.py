"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, nonet-tiny): GQA with normed q and k, softmax top-k, no shared expert.

After Hugging Face's `Qwen3MoeForCausalLM`.
"""

from __future__ import annotations

from functools import partial

from nonet.config.checkpoint import width
from nonet.kernels.linear import linear, pack
from nonet.layers.attention import Attention
from nonet.layers.rope import rope_of
from nonet.models.base import Parts, heads_of
from nonet.models.decoder import Decoder, Feed, Layer, dense_mlp, moe_layer
from nonet.moe.router import softmax_topk
from nonet.weights.slots import fill_slots, per_expert

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


class Model(Decoder):
    def __init__(self, parts: Parts) -> None:
        spec = parts.spec
        length = parts.config.model.max_model_len or spec.max_position
        rope = rope_of(spec, spec.head_dim, length, parts.dtype, parts.device)
        super().__init__(parts, [_layer(parts, index) for index in range(spec.num_layers)], rope)


def _layer(parts: Parts, index: int) -> Layer:
    spec, prefix = parts.spec, f"model.layers.{index}"
    attention = Attention(
        parts.checkpoint,
        f"{prefix}.self_attn",
        heads=heads_of(spec.num_heads, parts.tp),
        kv_heads=heads_of(spec.num_kv_heads, parts.tp),
        head_dim=spec.head_dim,
        norm_eps=spec.rms_norm_eps,
    )
    if index in spec.moe_layers:
        return Layer(parts, prefix, attention, _experts(parts, index, f"{prefix}.mlp"))
    return Layer(parts, prefix, attention, dense_mlp(parts, f"{prefix}.mlp", width(spec, "intermediate_size")))


def _experts(parts: Parts, index: int, prefix: str) -> Feed:
    spec, checkpoint = parts.spec, parts.checkpoint
    router = checkpoint.expect(f"{prefix}.gate.weight", (spec.num_experts, spec.hidden_size))
    return moe_layer(
        parts,
        index,
        gate=partial(linear, weight=pack(router)),
        rule=softmax_topk(spec.top_k, bool(spec.raw.get("norm_topk_prob", False))),
        fill=partial(fill_slots, checkpoint, per_expert(f"{prefix}.experts", "gate_proj", "up_proj", "down_proj")),
    )
