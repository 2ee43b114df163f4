"""Mixtral (8x7B, 8x22B): GQA, over a sliding window where config.json gives one, softmax top-k, no shared expert.

After Hugging Face's `MixtralForCausalLM`. docs/models.md explains this file line by line.
"""

from __future__ import annotations

from functools import partial

from nonet.config.checkpoint import ModelSpec, require
from nonet.kernels.linear import linear, pack
from nonet.layers.attention import Attention
from nonet.layers.rope import rope_of
from nonet.models.base import Parts, heads_of
from nonet.models.decoder import Decoder, Layer, moe_layer
from nonet.moe.router import softmax_topk
from nonet.weights.slots import fill_slots, per_expert

ARCHITECTURES = ("MixtralForCausalLM",)


class Model(Decoder):
    def __init__(self, parts: Parts) -> None:
        spec = parts.spec
        length = parts.config.model.max_model_len or spec.max_position
        rope = rope_of(spec, spec.head_dim, length, parts.dtype, parts.device)
        super().__init__(parts, [_layer(parts, index) for index in range(spec.num_layers)], rope)


def check(spec: ModelSpec) -> None:
    """Raise ModelError for what config.json asks for and is not done here."""
    window = spec.raw.get("sliding_window")
    counts = window is None or (isinstance(window, int) and window > 0)
    require(spec, counts, "sliding_window", window, "a positive count, or null")


def _layer(parts: Parts, index: int) -> Layer:
    spec, checkpoint, prefix = parts.spec, parts.checkpoint, f"model.layers.{index}"
    attention = Attention(
        checkpoint,
        f"{prefix}.self_attn",
        heads=heads_of(spec.num_heads, parts.tp),
        kv_heads=heads_of(spec.num_kv_heads, parts.tp),
        head_dim=spec.head_dim,
        window=spec.raw.get("sliding_window"),
    )
    router = checkpoint.expect(f"{prefix}.block_sparse_moe.gate.weight", (spec.num_experts, spec.hidden_size))
    experts = moe_layer(
        parts,
        index,
        gate=partial(linear, weight=pack(router)),
        rule=softmax_topk(spec.top_k, renormalise=True),
        fill=partial(fill_slots, checkpoint, per_expert(f"{prefix}.block_sparse_moe.experts", "w1", "w3", "w2")),
    )
    return Layer(parts, prefix, attention, experts)
