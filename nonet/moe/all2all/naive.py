"""Each rank broadcasts its rows in turn; the results of all rows are summed everywhere. For debugging.

Legend: see moe/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.comm.group import Pending
from nonet.moe.all2all._rows import pack, packed_width, spread_pairs, sum_spread, unpack
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts, group_by_slot


def create(spec: All2AllSpec) -> All2All:
    return Naive(spec)


@dataclass(frozen=True)
class _Ticket:
    first: int  # this rank's first row among all
    slot_TK: Tensor
    weight_TK: Tensor


class Naive:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec = spec
        self.takes: Takes = "pairs" if spec.exact else "rows"

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        group = self.spec.group
        parts = [torch.empty((count, packed_width(self.spec)), dtype=torch.uint8, device=x_TD.device) for count in rows]
        parts[group.rank] = pack(x_TD, slot_TK, weight_TK)
        pending = [group.broadcast(part, source) for source, part in enumerate(parts) if rows[source]]

        def finish() -> Dispatched:
            for one in pending:
                one.wait()
            x_ND, slot_NK, weight_NK = unpack(torch.cat(parts), self.spec)
            ticket = _Ticket(sum(rows[: group.rank]), slot_TK, weight_TK)
            return group_by_slot(x_ND, slot_NK - self.spec.first_slot, weight_NK, self.spec.num_slots, ticket)

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        pairs = self.takes == "pairs"
        summing = self.spec.group.all_reduce(spread_pairs(y, sent.pair_NK) if pairs else y)

        def finish() -> Tensor:
            own = summing.wait()[ticket.first : ticket.first + ticket.slot_TK.shape[0]]
            if not pairs:
                return own
            y_TKD = own.view(len(own), self.spec.top_k, self.spec.hidden_size)
            return sum_spread(y_TKD, ticket.weight_TK.masked_fill(ticket.slot_TK < 0, 0)).to(self.spec.dtype)

        return Pending(finish)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
