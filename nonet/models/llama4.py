"""Llama 4 (Scout, Maverick), the text part: attention in chunks and without positions, top-1 experts, a shared one.

After Hugging Face's `Llama4ForCausalLM`; of `Llama4ForConditionalGeneration` the language model is served, and images
are not. The router's sigmoid scales what an expert gets, so that one expert a token is all there can be. FP8 is not
read: experts are fused.
"""

from __future__ import annotations

from functools import partial

from nonet.config.checkpoint import ModelSpec, require, rope_parameters, width
from nonet.kernels.linear import linear, pack
from nonet.layers.attention import Attention, Temperature
from nonet.layers.mlp import GatedMlp
from nonet.layers.rope import rope_of
from nonet.models.base import Parts, heads_of
from nonet.models.decoder import Decoder, Feed, Layer, dense_mlp, moe_layer
from nonet.moe.router import scored_topk
from nonet.weights.fused import fill_fused_slots

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")

_CHUNKED, _FULL = "chunked_attention", "full_attention"


class Model(Decoder):
    def __init__(self, parts: Parts) -> None:
        spec = parts.spec
        length = parts.config.model.max_model_len or spec.max_position
        rope = rope_of(spec, spec.head_dim, length, parts.dtype, parts.device)
        prefix = "language_model." if spec.architecture == "Llama4ForConditionalGeneration" else ""
        kinds = list(zip(turned_layers(spec), attention_types(spec), strict=True))
        layers = [_layer(parts, f"{prefix}model.layers.{i}", i, *kind) for i, kind in enumerate(kinds)]
        super().__init__(parts, layers, rope, prefix)


def check(spec: ModelSpec) -> None:
    """Raise ModelError for what config.json asks for and is not done here."""
    require(spec, spec.top_k == 1, "num_experts_per_tok", spec.top_k, "1: a score scales what its expert gets")
    quantized = spec.raw.get("quantization_config")
    require(spec, not quantized, "quantization_config", quantized, "none: fused experts are read as plain numbers")
    kind = rope_parameters(spec)["rope_type"]
    require(spec, kind != "yarn", "rope_type", kind, "default, linear, llama3: those that keep the lengths of q and k")
    known = {_CHUNKED, _FULL}
    kinds = attention_types(spec)
    require(spec, set(kinds) <= known, "layer_types", kinds, ", ".join(sorted(known)))
    size = spec.raw.get("attention_chunk_size")
    needed = _CHUNKED in kinds
    require(spec, not needed or (isinstance(size, int) and size > 0), "attention_chunk_size", size, "a positive count")


def turned_layers(spec: ModelSpec) -> list[bool]:
    """Of each layer, whether it knows positions by rope. The key says so too, whatever its name suggests."""
    given, every = spec.raw.get("no_rope_layers"), int(spec.raw.get("no_rope_layer_interval") or 4)
    turned = [bool(layer) for layer in given] if given else [(i + 1) % every != 0 for i in range(spec.num_layers)]
    enough = len(turned) >= spec.num_layers
    require(spec, enough, "no_rope_layers", given, f"a number for each of {spec.num_layers} layers")
    return turned[: spec.num_layers]


def attention_types(spec: ModelSpec) -> list[str]:
    """Of each layer: within chunks where there is rope, over everything where there is none, unless told otherwise."""
    given = spec.raw.get("layer_types") or [_CHUNKED if turned else _FULL for turned in turned_layers(spec)]
    require(spec, len(given) == spec.num_layers, "layer_types", given, f"a word for each of {spec.num_layers} layers")
    return list(given)


def _layer(parts: Parts, prefix: str, index: int, turned: bool, kind: str) -> Layer:
    spec, raw = parts.spec, parts.spec.raw
    tuned = not turned and raw.get("attn_temperature_tuning", True)
    attention = Attention(
        parts.checkpoint,
        f"{prefix}.self_attn",
        heads=heads_of(spec.num_heads, parts.tp),
        kv_heads=heads_of(spec.num_kv_heads, parts.tp),
        head_dim=spec.head_dim,
        norm_eps=spec.rms_norm_eps if turned and raw.get("use_qk_norm", True) else None,
        norm_weights=False,
        chunk=raw["attention_chunk_size"] if kind == _CHUNKED else None,
        rope=turned,
        interleaved=True,
        temperature=Temperature(raw.get("floor_scale", 8192), raw.get("attn_scale", 0.1)) if tuned else None,
    )
    feed = f"{prefix}.feed_forward"
    if index in spec.moe_layers:
        return Layer(parts, prefix, attention, _experts(parts, index, feed))
    return Layer(parts, prefix, attention, dense_mlp(parts, feed, width(spec, "intermediate_size_mlp")))


def _experts(parts: Parts, index: int, prefix: str) -> Feed:
    spec, checkpoint = parts.spec, parts.checkpoint
    router = checkpoint.expect(f"{prefix}.router.weight", (spec.num_experts, spec.hidden_size))
    return moe_layer(
        parts,
        index,
        gate=partial(linear, weight=pack(router)),
        rule=scored_topk(1, "sigmoid", renormalise=False),
        fill=partial(fill_fused_slots, checkpoint, f"{prefix}.experts"),
        shared=GatedMlp(checkpoint, f"{prefix}.shared_expert", (0, spec.moe_intermediate_size)),
        weighs_input=True,
    )
