"""DeepSeek-V2, V2-Lite, V3 and R1, Kimi-K2: latent attention, shared experts, group-limited or plain top-k, YaRN.

After Hugging Face's `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`, and the code that DeepSeek released with the
checkpoints. Layers for multi-token prediction, which stand behind the last, are left alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.config.checkpoint import ModelSpec, require, rope_parameters, width
from nonet.layers.mla import LatentAttention, LatentShape
from nonet.layers.mlp import GatedMlp
from nonet.layers.rope import rope_of, yarn_mscale
from nonet.models.base import Parts, heads_of
from nonet.models.decoder import Decoder, Feed, Layer, dense_mlp, moe_layer
from nonet.moe.router import Groups, Rule, scored_topk
from nonet.weights.slots import fill_slots, per_expert

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK2ForCausalLM")

# What the architecture means where a config.json says nothing: transformers 5 writes neither of the first two.
_V2 = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
_BEST = {"group_limited_greedy": 1, "noaux_tc": 2}  # scores of a group that say what it is worth


class Model(Decoder):
    def __init__(self, parts: Parts) -> None:
        spec = parts.spec
        length = parts.config.model.max_model_len or spec.max_position
        rope = rope_of(spec, spec.qk_rope_head_dim, length, parts.dtype, parts.device)
        shape = latent_shape(spec)
        super().__init__(parts, [_layer(parts, index, shape) for index in range(spec.num_layers)], rope)


def check(spec: ModelSpec) -> None:
    """Raise ModelError for what config.json asks for and is not done here."""
    raw = spec.raw
    require(spec, not raw.get("mlp_bias"), "mlp_bias", raw.get("mlp_bias"), "false")
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        require(spec, isinstance(raw.get(key), int) and raw[key] > 0, key, raw.get(key), "a positive width")
    require(spec, spec.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", spec.qk_rope_head_dim, "even widths")
    latent_shape(spec)
    routing_rule(spec, None)


def latent_shape(spec: ModelSpec) -> LatentShape:
    """The widths of attention. YaRN's sharpening is squared here, as it is meant for both sides of the product."""
    raw, rope = spec.raw, rope_parameters(spec)
    turns_neighbours = _is_v2(spec) or raw.get("rope_interleave") is not False  # V2 has no such key
    scale = (raw["qk_nope_head_dim"] + spec.qk_rope_head_dim) ** -0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return LatentShape(
        hidden=spec.hidden_size,
        q_lora_rank=int(raw["q_lora_rank"]) if raw.get("q_lora_rank") else None,
        kv_lora_rank=spec.kv_lora_rank,
        nope=raw["qk_nope_head_dim"],
        rope=spec.qk_rope_head_dim,
        value=raw["v_head_dim"],
        scale=scale,
        interleaved=turns_neighbours,
    )


def routing_rule(spec: ModelSpec, bias_E: Tensor | None) -> Rule:
    """How the router chooses. Raises ModelError for a choice that no released model makes."""
    told = _told(spec)
    method, scoring, renormalise = (told[key] for key in ("topk_method", "scoring_func", "norm_topk_prob"))
    require(spec, scoring in ("softmax", "sigmoid"), "scoring_func", scoring, "softmax, sigmoid")
    require(spec, method in ("greedy", *_BEST), "topk_method", method, ", ".join(("greedy", *_BEST)))
    alone = not (renormalise and _is_v2(spec) and told["routed_scaling_factor"] != 1)  # their authors do one or both
    require(spec, alone, "norm_topk_prob", renormalise, "false where routed_scaling_factor is not 1")
    return scored_topk(
        spec.top_k,
        scoring,
        bias_E=bias_E,
        groups=_groups(spec, _BEST[method]) if method in _BEST else None,
        renormalise=bool(renormalise),
        scale=float(told["routed_scaling_factor"]),
    )


def _groups(spec: ModelSpec, best: int) -> Groups | None:
    """None where all groups are kept."""
    count, kept = int(spec.raw.get("n_group") or 1), int(spec.raw.get("topk_group") or 1)
    require(spec, count > 0 and spec.num_experts % count == 0, "n_group", count, f"divisors of {spec.num_experts}")
    require(spec, 1 <= kept <= count, "topk_group", kept, f"1 to {count}")
    if kept == count:
        return None
    size = spec.num_experts // count
    require(spec, best <= size, "n_group", count, f"groups of {best} experts or more")
    require(spec, kept * size >= spec.top_k, "topk_group", kept, f"groups with {spec.top_k} experts or more in all")
    return Groups(count, kept, best)


def _layer(parts: Parts, index: int, shape: LatentShape) -> Layer:
    spec, prefix = parts.spec, f"model.layers.{index}"
    heads = heads_of(spec.num_heads, parts.tp)
    attention = LatentAttention(parts.checkpoint, f"{prefix}.self_attn", heads=heads, shape=shape)
    if index in spec.moe_layers:
        return Layer(parts, prefix, attention, _experts(parts, index, f"{prefix}.mlp"))
    return Layer(parts, prefix, attention, dense_mlp(parts, f"{prefix}.mlp", width(spec, "intermediate_size")))


def _experts(parts: Parts, index: int, prefix: str) -> Feed:
    spec, checkpoint = parts.spec, parts.checkpoint
    gate = checkpoint.expect(f"{prefix}.gate.weight", (spec.num_experts, spec.hidden_size)).float()
    bias_E = None
    if _told(spec)["topk_method"] == "noaux_tc":  # in float32 as it is stored: it tells scores apart that lie close
        bias_E = checkpoint.read(f"{prefix}.gate.e_score_correction_bias", dtype=torch.float32)
    shared = None
    if spec.raw.get("n_shared_experts"):
        width = spec.moe_intermediate_size * int(spec.raw["n_shared_experts"])
        shared = GatedMlp(checkpoint, f"{prefix}.shared_experts", (0, width))
    return moe_layer(
        parts,
        index,
        gate=lambda x_TD: F.linear(x_TD.float(), gate),
        rule=routing_rule(spec, bias_E),
        fill=partial(fill_slots, checkpoint, per_expert(f"{prefix}.experts", "gate_proj", "up_proj", "down_proj")),
        shared=shared,
    )


def _is_v2(spec: ModelSpec) -> bool:
    return spec.architecture == "DeepseekV2ForCausalLM"


def _told(spec: ModelSpec) -> dict[str, Any]:
    """The router's keys, with what the architecture means by those that are missing."""
    meant = _V2 if _is_v2(spec) else _V3
    return {key: default if spec.raw.get(key) is None else spec.raw[key] for key, default in meant.items()}
