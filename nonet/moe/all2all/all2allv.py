"""Each row travels only to the ranks that hold its slots, by one uneven all-to-all each way.

The counts are exchanged first, which costs a host synchronisation. Legend: see moe/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.comm.group import Pending
from nonet.moe.all2all._route import Route, Router, add_rows, place_pairs
from nonet.moe.all2all._rows import pack, sum_spread, unpack
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts, group_by_slot


def create(spec: All2AllSpec) -> All2All:
    return All2AllV(spec)


@dataclass(frozen=True)
class _Ticket:
    route: Route
    received: list[int]  # rows from each rank
    weight_TK: Tensor


class All2AllV:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec = spec
        self.takes: Takes = "pairs" if spec.exact else "rows"
        self._router = Router(spec)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        group = self.spec.group
        route = self._router.route(slot_TK)
        ones = [1] * group.size
        counts = group.all_to_all_rows(torch.tensor(route.counts, device=x_TD.device), ones, ones).wait().tolist()
        packed = pack(x_TD, slot_TK, weight_TK).index_select(0, route.token_P)
        moving = group.all_to_all_rows(packed, route.counts, counts)

        def finish() -> Dispatched:
            x_ND, slot_NK, weight_NK = unpack(moving.wait(), self.spec)
            ticket = _Ticket(route, counts, weight_TK)
            return group_by_slot(x_ND, slot_NK - self.spec.first_slot, weight_NK, self.spec.num_slots, ticket)

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        route, group = ticket.route, self.spec.group
        if self.takes == "rows":
            rows_back = group.all_to_all_rows(y, ticket.received, route.counts)
            parts = lambda: rows_back.wait().split(route.counts)
            return Pending(lambda: add_rows(parts(), route, len(route.rank_TK)).to(self.spec.dtype))
        pairs_out = [int((part >= 0).sum()) for part in sent.pair_NK.split(ticket.received)]
        pairs_in = torch.bincount(route.rank_TK.reshape(-1), minlength=group.size + 1)[: group.size].tolist()
        flat = sent.pair_NK.reshape(-1)
        pairs_back = group.all_to_all_rows(y[flat[flat >= 0]], pairs_out, pairs_in)

        def finish() -> Tensor:
            y_TKD = place_pairs(pairs_back.wait(), route)
            weight_TK = ticket.weight_TK.masked_fill(route.rank_TK == group.size, 0)
            return sum_spread(y_TKD, weight_TK).to(self.spec.dtype)

        return Pending(finish)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
