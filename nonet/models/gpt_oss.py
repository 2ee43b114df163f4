"""gpt-oss (20b, 120b) in bfloat16: sinks, every other layer over a sliding window, biases, clamped activation, YaRN.

After Hugging Face's `GptOssForCausalLM`. The released checkpoints hold MXFP4, which is not read:
transformers saves them in bfloat16. Nor is FP8, where experts are fused.
"""

from __future__ import annotations

from functools import partial

from nonet.config.checkpoint import ModelSpec, require
from nonet.kernels.linear import linear, pack
from nonet.layers.attention import Attention
from nonet.layers.rope import rope_of
from nonet.models.base import Parts, heads_of
from nonet.models.decoder import Decoder, Layer, moe_layer
from nonet.moe.experts.reference import ALPHA, LIMIT
from nonet.moe.router import softmax_topk
from nonet.weights.fused import fill_fused_slots

ARCHITECTURES = ("GptOssForCausalLM",)

_SLIDING, _FULL = "sliding_attention", "full_attention"


class Model(Decoder):
    def __init__(self, parts: Parts) -> None:
        spec = parts.spec
        length = parts.config.model.max_model_len or spec.max_position
        rope = rope_of(spec, spec.head_dim, length, parts.dtype, parts.device)
        layers = [_layer(parts, index, kind) for index, kind in enumerate(attention_types(spec))]
        super().__init__(parts, layers, rope)


def check(spec: ModelSpec) -> None:
    """Raise ModelError for what config.json asks for and is not done here."""
    raw, kinds = spec.raw, attention_types(spec)
    known = {_SLIDING, _FULL}
    require(spec, set(kinds) <= known, "layer_types", kinds, ", ".join(sorted(known)))
    window = raw.get("sliding_window")
    needed = _SLIDING in kinds
    require(spec, not needed or (isinstance(window, int) and window > 0), "sliding_window", window, "a positive count")
    for key, value in (("swiglu_alpha", ALPHA), ("swiglu_limit", LIMIT)):
        require(spec, raw.get(key, value) == value, key, raw.get(key), str(value))
    quantized = raw.get("quantization_config") or {}
    remedy = "none; save it in bfloat16 first, as docs/models.md says"
    require(spec, not quantized, "quantization_config.quant_method", quantized.get("quant_method"), remedy)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    require(spec, bool(rope), "rope_parameters", rope, "the family's, given in full")


def attention_types(spec: ModelSpec) -> list[str]:
    """Of each layer: it begins with a sliding window and takes turns, unless told otherwise."""
    given = spec.raw.get("layer_types") or [(_SLIDING, _FULL)[i % 2] for i in range(spec.num_layers)]
    require(spec, len(given) == spec.num_layers, "layer_types", given, f"a word for each of {spec.num_layers} layers")
    return list(given)


def _layer(parts: Parts, index: int, kind: str) -> Layer:
    spec, checkpoint, prefix = parts.spec, parts.checkpoint, f"model.layers.{index}"
    attention = Attention(
        checkpoint,
        f"{prefix}.self_attn",
        heads=heads_of(spec.num_heads, parts.tp),
        kv_heads=heads_of(spec.num_kv_heads, parts.tp),
        head_dim=spec.head_dim,
        window=spec.raw["sliding_window"] if kind == _SLIDING else None,
        sinks=True,
    )
    router = checkpoint.expect(f"{prefix}.mlp.router.weight", (spec.num_experts, spec.hidden_size))
    router_bias = checkpoint.expect(f"{prefix}.mlp.router.bias", (spec.num_experts,))
    experts = moe_layer(
        parts,
        index,
        gate=partial(linear, weight=pack(router), bias_N=router_bias),
        rule=softmax_topk(spec.top_k, renormalise=True),  # the same as softmax over the K best
        fill=partial(fill_fused_slots, checkpoint, f"{prefix}.mlp.experts", interleaved=True, activation="clamped"),
    )
    return Layer(parts, prefix, attention, experts)
