"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, nonet-tiny): GQA with normed q and k, softmax top-k, no shared expert.

After Hugging Face's `Qwen3MoeForCausalLM`. Between blocks the residual rows are split over the tensor-parallel ranks:
attention and dense MLPs gather them and scatter their sums, MoE layers take them as they are.
Legend: t this rank's rows, T its data-parallel rank's tokens, D hidden, B rows that want logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from nonet.kernels.linear import linear, pack
from nonet.layers.attention import Attention, KvCache
from nonet.layers.embedding import Vocabulary
from nonet.layers.mlp import DenseMlp, span_of
from nonet.layers.norm import add_rms_norm, rms_norm
from nonet.layers.rope import Rope
from nonet.models.base import Batch, Parts, heads_of
from nonet.moe.layer import MoeLayer
from nonet.moe.lookup import Lookup
from nonet.moe.router import Rule, softmax_topk
from nonet.moe.simulate import simulated
from nonet.weights.slots import fill_slots

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


class Model:
    """Embedding, layers, last norm, vocabulary."""

    def __init__(self, parts: Parts) -> None:
        spec, checkpoint = parts.spec, parts.checkpoint
        self.tp, self.eps, self.num_layers = parts.tp, spec.rms_norm_eps, spec.num_layers
        self.embedding = Vocabulary(checkpoint, "model.embed_tokens.weight", spec.vocab_size, parts.tp)
        self.layers = [Layer(parts, index) for index in range(spec.num_layers)]
        self.norm = checkpoint.expect("model.norm.weight", (spec.hidden_size,))
        tied = spec.tie_word_embeddings
        head = self.embedding if tied else Vocabulary(checkpoint, "lm_head.weight", spec.vocab_size, parts.tp)
        self.head = head.as_head()
        length = parts.config.model.max_model_len or spec.max_position
        self.rope = Rope(spec.head_dim, spec.rope_theta, length, parts.dtype, parts.device)

    def forward(self, batch: Batch, cache: Sequence[KvCache]) -> Tensor:
        cos_sin = self.rope.at(batch.position_T)
        x_tD = self.embedding.embed(batch.token_T, batch.tp_rows)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_tD = layer.forward(x_tD, cos_sin, layer_cache, batch)
        x_TD = self.tp.all_gather_rows(x_tD, batch.tp_rows).wait()
        return rms_norm(x_TD[batch.logit_row_B], self.norm, self.eps)

    def logits(self, x_BD: Tensor) -> Tensor:
        return self.head.logits(x_BD)


class Layer:
    """Attention, then experts or a dense MLP, each behind a norm and added to the residual."""

    def __init__(self, parts: Parts, index: int) -> None:
        spec, checkpoint = parts.spec, parts.checkpoint
        prefix = f"model.layers.{index}"
        self.tp, self.eps = parts.tp, spec.rms_norm_eps
        self.attention_norm = checkpoint.expect(f"{prefix}.input_layernorm.weight", (spec.hidden_size,))
        self.mlp_norm = checkpoint.expect(f"{prefix}.post_attention_layernorm.weight", (spec.hidden_size,))
        self.attention = Attention(
            checkpoint,
            f"{prefix}.self_attn",
            heads=heads_of(spec.num_heads, parts.tp),
            kv_heads=heads_of(spec.num_kv_heads, parts.tp),
            head_dim=spec.head_dim,
            norm_eps=spec.rms_norm_eps,
        )
        self.moe = moe_layer(parts, index) if index in spec.moe_layers else None
        self.dense = None
        if self.moe is None:
            self.dense = DenseMlp(checkpoint, f"{prefix}.mlp", int(spec.raw["intermediate_size"]), parts.tp)

    def forward(self, x_tD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: Batch) -> Tensor:
        h_TD = self.tp.all_gather_rows(rms_norm(x_tD, self.attention_norm, self.eps), batch.tp_rows).wait()
        if h_TD.shape[0]:
            h_TD = self.attention.forward(h_TD, cos_sin, cache, batch.attention)
        h_tD = self.tp.reduce_scatter_rows(h_TD, batch.tp_rows).wait()
        x_tD, h_tD = add_rms_norm(x_tD, h_tD, self.mlp_norm, self.eps)
        if self.moe is not None:
            return x_tD + self.moe.forward(h_tD, batch.moe)
        assert self.dense is not None
        return x_tD + self.dense.forward(h_tD, batch.tp_rows)


def moe_layer(parts: Parts, index: int) -> MoeLayer:
    """The experts of model layer `index`, in this rank's slots."""
    spec, moe = parts.spec, parts.config.moe
    prefix = f"model.layers.{index}.mlp"
    ordinal = spec.moe_layers.index(index)
    gate = parts.checkpoint.expect(f"{prefix}.gate.weight", (spec.num_experts, spec.hidden_size))

    def names(expert: int) -> tuple[str, str, str]:
        base = f"{prefix}.experts.{expert}"
        return f"{base}.gate_proj.weight", f"{base}.up_proj.weight", f"{base}.down_proj.weight"

    if parts.config.parallel.enable_expert_parallel or parts.ep.size == 1:
        experts, span = parts.placement.experts_on(parts.ep.rank, ordinal), (0, spec.moe_intermediate_size)
    else:
        experts = list(range(spec.num_experts))
        span = span_of(spec.moe_intermediate_size, parts.ep.size, parts.ep.rank)
    rule: Rule = softmax_topk(spec.top_k, bool(spec.raw.get("norm_topk_prob", False)))
    if moe.routing_simulation:
        seed = parts.config.model.seed + parts.ep.rank * spec.num_layers + index
        rule = simulated(moe.routing_simulation, spec.num_experts, spec.top_k, parts.ep.size, seed)
    return MoeLayer(
        index=ordinal,
        gate=partial(linear, weight=pack(gate)),
        rule=rule,
        lookup=Lookup(parts.placement, ordinal, parts.ep.rank, parts.device),
        load=parts.load,
        all2all=parts.all2all,
        experts=parts.experts,
        slots=fill_slots(parts.checkpoint, names, experts, span),
        max_rows=parts.max_rows,
    )
