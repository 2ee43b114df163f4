"""What all families share: embedding, layers of attention and experts behind norms, last norm, vocabulary.

A family gives each layer its attention and what follows it, and the checkpoint's names of both. Between blocks the
residual rows are split over the tensor-parallel ranks: attention and dense MLPs gather them and scatter their sums, MoE
layers take them as they are. Legend: t this rank's rows, T its data-parallel rank's tokens, D hidden, B rows that want
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from nonet.layers.attention import AttentionBatch, KvCache
from nonet.layers.embedding import Vocabulary
from nonet.layers.mlp import DenseMlp, span_of
from nonet.layers.norm import add_rms_norm, rms_norm
from nonet.layers.rope import Rope
from nonet.models.base import Batch, Parts
from nonet.moe.layer import MoeLayer
from nonet.moe.router import Rule
from nonet.moe.simulate import simulated
from nonet.weights.loader import Range
from nonet.weights.slots import SlotWeights

Feed = Callable[[Tensor, Batch], Tensor]  # what follows attention in a layer, on rows [t, D]


class AttentionLayer(Protocol):
    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: AttentionBatch) -> Tensor:
        """This rank's part of the sum over heads: [T, D]. Not called without tokens."""
        ...


class Decoder:
    """Embedding, layers, last norm, vocabulary, by the names that Hugging Face gives them behind `prefix`."""

    def __init__(self, parts: Parts, layers: Sequence[Layer], rope: Rope, prefix: str = "") -> None:
        spec, checkpoint = parts.spec, parts.checkpoint
        self.tp, self.eps, self.num_layers = parts.tp, spec.rms_norm_eps, spec.num_layers
        self.layers, self.rope = layers, rope
        self.embedding = Vocabulary(checkpoint, f"{prefix}model.embed_tokens.weight", spec.vocab_size, parts.tp)
        self.norm = checkpoint.expect(f"{prefix}model.norm.weight", (spec.hidden_size,))
        tied = spec.tie_word_embeddings
        head = self.embedding if tied else Vocabulary(checkpoint, f"{prefix}lm_head.weight", spec.vocab_size, parts.tp)
        self.head = head.as_head()

    def forward(self, batch: Batch, cache: Sequence[KvCache]) -> Tensor:
        cos_sin = self.rope.at(batch.position_T)
        x_tD, y_tD = self.embedding.embed(batch.token_T, batch.tp_rows), None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_tD, y_tD = layer.forward(x_tD, y_tD, cos_sin, layer_cache, batch)
        x_TD = self.tp.all_gather_rows(x_tD if y_tD is None else x_tD + y_tD, batch.tp_rows).wait()
        return rms_norm(x_TD[batch.logit_row_B], self.norm, self.eps)

    def logits(self, x_BD: Tensor) -> Tensor:
        return self.head.logits(x_BD)


class Layer:
    """Attention, then experts or a dense MLP, each behind a norm; the norm that follows adds it to the residual."""

    def __init__(self, parts: Parts, prefix: str, attention: AttentionLayer, feed: Feed) -> None:
        shape = (parts.spec.hidden_size,)
        self.tp, self.eps, self.attention, self.feed = parts.tp, parts.spec.rms_norm_eps, attention, feed
        self.attention_norm = parts.checkpoint.expect(f"{prefix}.input_layernorm.weight", shape)
        self.feed_norm = parts.checkpoint.expect(f"{prefix}.post_attention_layernorm.weight", shape)

    def forward(
        self, x_tD: Tensor, y_tD: Tensor | None, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """From (residual, what is still to be added to it; None before the first layer) to the same behind this one."""
        if y_tD is None:
            h_tD = rms_norm(x_tD, self.attention_norm, self.eps)
        else:
            x_tD, h_tD = add_rms_norm(x_tD, y_tD, self.attention_norm, self.eps)
        h_TD = self.tp.all_gather_rows(h_tD, batch.tp_rows).wait()
        if h_TD.shape[0]:
            h_TD = self.attention.forward(h_TD, cos_sin, cache, batch.attention)
        h_tD = self.tp.reduce_scatter_rows(h_TD, batch.tp_rows).wait()
        x_tD, h_tD = add_rms_norm(x_tD, h_tD, self.feed_norm, self.eps)
        return x_tD, self.feed(h_tD, batch)


def dense_mlp(parts: Parts, prefix: str, intermediate_size: int) -> Feed:
    """A gated MLP, split over the tensor-parallel ranks."""
    mlp = DenseMlp(parts.checkpoint, prefix, intermediate_size, parts.tp)
    return lambda x_tD, batch: mlp.forward(x_tD, batch.tp_rows)


def moe_layer(
    parts: Parts,
    index: int,
    *,
    gate: Callable[[Tensor], Tensor],
    rule: Rule,
    fill: Callable[[Sequence[int], Range, int], SlotWeights],
    shared: Callable[[Tensor], Tensor] | None = None,
    weighs_input: bool = False,
) -> Feed:
    """The experts of model layer `index`. `fill` makes slots of (experts, part of their width, their whole width).

    gate: rows to router logits; shared: the shared expert on this rank's rows, if there is one; weighs_input: the
    router's weight scales what an expert gets, not what it gives.
    """
    spec, moe = parts.spec, parts.config.moe
    ordinal = spec.moe_layers.index(index)
    if parts.config.parallel.enable_expert_parallel or parts.ep.size == 1:
        experts, span = parts.placement.experts_on(parts.ep.rank, ordinal), (0, spec.moe_intermediate_size)
    else:
        experts = list(range(spec.num_experts))
        span = span_of(spec.moe_intermediate_size, parts.ep.size, parts.ep.rank)
    if moe.routing_simulation:
        seed = parts.config.model.seed + parts.ep.rank * spec.num_layers + index
        rule = simulated(moe.routing_simulation, spec.num_experts, spec.top_k, parts.ep.size, seed)
    slots = fill(experts, span, spec.moe_intermediate_size)
    parts.experts.check(slots)
    layer = MoeLayer(
        index=ordinal,
        gate=gate,
        rule=rule,
        lookup=parts.lookups.of(ordinal),
        load=parts.load,
        all2all=parts.all2all,
        experts=parts.experts,
        slots=slots,
        max_rows=parts.max_rows,
        shared=shared,
        weighs_input=weighs_input,
    )
    return lambda x_tD, batch: layer.forward(x_tD, batch.moe)
