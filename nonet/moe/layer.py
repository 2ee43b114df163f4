"""The heart: one Mixture-of-Experts layer, over however many ranks, whatever moves the tokens.

Built by a model for each of its MoE layers. Sees slots and a lookup, never a placement policy; an all-to-all and an
expert kernel, never which. Legend: T own tokens, D hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.moe.base import All2All, Experts
from nonet.moe.load import LoadCounter
from nonet.moe.lookup import Lookup
from nonet.moe.router import Rule
from nonet.weights.slots import SlotWeights


@dataclass(frozen=True, slots=True)
class MoeBatch:
    """What a step tells the MoE layers: tokens of every rank, and whether this rank's are real."""

    rows: tuple[int, ...]
    is_load: bool = True


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """Router, all-to-all, experts and shared expert, composed."""

    index: int  # among the MoE layers
    gate: Callable[[Tensor], Tensor]  # x_TD -> router logits
    rule: Rule
    lookup: Lookup
    load: LoadCounter
    all2all: All2All
    experts: Experts
    slots: SlotWeights
    max_rows: int  # tokens of one rank in one pass; more are chunked
    shared: Callable[[Tensor], Tensor] | None = None
    weighs_input: bool = False  # the weight scales an expert's row instead of its result (Llama 4); top-1 only

    def forward(self, x_TD: Tensor, batch: MoeBatch) -> Tensor:
        """[T, D]. Every rank makes the same number of passes, also one without tokens."""
        expert_TK, weight_TK = self.rule(self.gate(x_TD))
        slot_TK = self.lookup(expert_TK)
        if batch.is_load:
            self.load.add(self.index, expert_TK, slot_TK)
        passes = list(chunks(batch.rows, self.max_rows))
        if len(passes) == 1:
            return self.one_pass(x_TD, slot_TK, weight_TK, passes[0])
        out, start = [x_TD[:0]], 0
        for rows in passes:
            end = start + rows[self.lookup.rank]
            out.append(self.one_pass(x_TD[start:end], slot_TK[start:end], weight_TK[start:end], rows))
            start = end
        return torch.cat(out)

    def one_pass(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Tensor:
        routed_TD = x_TD
        if self.weighs_input:
            routed_TD, weight_TK = x_TD * weight_TK.to(x_TD.dtype), torch.ones_like(weight_TK)
        sending = self.all2all.dispatch(routed_TD, slot_TK, weight_TK, rows)
        shared_TD = self.shared(x_TD) if self.shared else None  # runs while tokens travel
        sent = sending.wait()
        y_TD = self.all2all.combine(self.experts(sent, self.slots, self.all2all.takes), sent).wait()
        return y_TD if shared_TD is None else y_TD + shared_TD


def chunks(rows: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Token counts of every rank in each pass; the same list on every rank, and empty if nobody has a token."""
    done = 0
    while done < max(rows):
        yield tuple(min(limit, max(0, count - done)) for count in rows)
        done += limit
