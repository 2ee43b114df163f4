"""Every rank sees all rows (all-gather), computes its slots' part, and the parts are summed (reduce-scatter).

Needs nothing but a collective library: the default. Legend: see moe/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nonet.comm.group import Pending
from nonet.moe.all2all._rows import pack, spread_pairs, sum_spread, unpack
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts, group_by_slot


def create(spec: All2AllSpec) -> All2All:
    return AllGatherReduceScatter(spec)


@dataclass(frozen=True)
class _Ticket:
    rows: tuple[int, ...]
    slot_TK: Tensor
    weight_TK: Tensor


class AllGatherReduceScatter:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec = spec
        self.takes: Takes = "pairs" if spec.exact else "rows"

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        gathering = self.spec.group.all_gather_rows(pack(x_TD, slot_TK, weight_TK), rows)

        def finish() -> Dispatched:
            x_ND, slot_NK, weight_NK = unpack(gathering.wait(), self.spec)
            ticket = _Ticket(tuple(rows), slot_TK, weight_TK)
            return group_by_slot(x_ND, slot_NK - self.spec.first_slot, weight_NK, self.spec.num_slots, ticket)

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        if self.takes == "rows":
            return self.spec.group.reduce_scatter_rows(y, ticket.rows)
        summing = self.spec.group.reduce_scatter_rows(spread_pairs(y, sent.pair_NK), ticket.rows)

        def finish() -> Tensor:
            y_TKD = summing.wait().view(len(ticket.slot_TK), self.spec.top_k, self.spec.hidden_size)
            return sum_spread(y_TKD, ticket.weight_TK.masked_fill(ticket.slot_TK < 0, 0)).to(self.spec.dtype)

        return Pending(finish)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
