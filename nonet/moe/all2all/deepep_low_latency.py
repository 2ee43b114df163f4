"""Adapter to DeepEP's kernels for few tokens: decode, over NVLink and RDMA.

A row goes to each of its slots, so one that has two slots on a rank goes there twice; the token's own rank weighs and
adds what comes back. Nothing waits on the host. The buffers hold the most rows of every rank for each slot: bound them
with `max_num_tokens`. See `_deepep`. Legend: see moe/base.py; C rows that one slot may get, N = S * C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonet.comm.group import Pending
from nonet.moe.all2all import _deepep
from nonet.moe.all2all._library import EvenIds
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts

NAME = "deepep_low_latency"
unavailable = _deepep.unavailable


def create(spec: All2AllSpec) -> All2All:
    """Raises ConfigError for what DeepEP does not do."""
    _deepep.check(NAME, spec)
    return LowLatency(spec)


@dataclass(frozen=True, slots=True)
class _Ticket:
    handle: Any  # DeepEP's
    id_TK: Tensor
    weight_TK: Tensor
    num_tokens: int


class LowLatency:
    captures = True
    takes: Takes = "pairs"

    def __init__(self, spec: All2AllSpec) -> None:
        from deep_ep import Buffer

        self.spec = spec
        self._ids = EvenIds(spec, absent=-1)
        size = spec.group.size
        self._experts = size * self._ids.most
        self._buffer = _deepep.open_buffer(
            spec,
            num_nvl_bytes=0,
            num_rdma_bytes=Buffer.get_low_latency_rdma_size_hint(spec.max_rows, spec.hidden_size, size, self._experts),
            low_latency_mode=True,
            num_qps_per_rank=self._ids.most,
        )

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        x, id_TK, weight = _deepep.never_none(x_TD, self._ids(slot_TK), weight_TK)
        received, count, handle, _, receive = self._buffer.low_latency_dispatch(
            x, id_TK, self.spec.max_rows, self._experts, use_fp8=self.spec.fp8, return_recv_hook=True
        )
        ticket = _Ticket(handle, id_TK, weight, len(x_TD))

        def finish() -> Dispatched:
            receive()
            S = self.spec.num_slots
            x_SCD, scale_SCd = received if self.spec.fp8 else (received, None)
            scale_Nd = None if scale_SCd is None else scale_SCd[:S].flatten(0, 1).contiguous()
            return _padded(x_SCD[:S], scale_Nd, count[:S].long(), ticket)

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket, spec = sent.ticket, self.spec
        assert isinstance(ticket, _Ticket)
        y_ECD = torch.empty(
            (self._ids.most, spec.max_rows * spec.group.size, spec.hidden_size), dtype=spec.dtype, device=y.device
        )
        if len(y):  # a place that no pair stands in gets any row: it is not read
            y_ECD[: spec.num_slots].flatten(0, 1).copy_(y.index_select(0, sent.pair_NK[:, 0].clamp(min=0)))
        out, _, receive = self._buffer.low_latency_combine(
            y_ECD, ticket.id_TK, ticket.weight_TK, ticket.handle, return_recv_hook=True
        )

        def finish() -> Tensor:
            receive()
            return out[: ticket.num_tokens]

        return Pending(finish)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        """DeepEP raises by itself when a rank stays away."""

    def close(self) -> None:
        self._buffer.destroy()


def _padded(x_SCD: Tensor, scale_Nd: Tensor | None, count_S: Tensor, ticket: _Ticket) -> Dispatched:
    """Slot s has its rows at the beginning of its C places, one pair a row; pairs are numbered without the gaps."""
    S, C, D = x_SCD.shape
    start_S = torch.cumsum(count_S, 0) - count_S
    place_C = torch.arange(C, device=x_SCD.device)
    pair_N = torch.where(place_C < count_S.unsqueeze(1), start_S.unsqueeze(1) + place_C, -1).flatten()
    row_M = torch.zeros(S * C + 1, dtype=torch.int64, device=x_SCD.device)
    row_M[torch.where(pair_N >= 0, pair_N, S * C)] = torch.arange(S * C, device=x_SCD.device)  # the last is no pair
    weight_M = torch.ones(S * C, device=x_SCD.device)  # the tokens' own ranks have the weights
    x_ND, pair_NK = x_SCD.reshape(S * C, D), pair_N.unsqueeze(1)
    return Dispatched(x_ND, row_M[:-1], weight_M, pair_NK, start_S, count_S, ticket, scale_Nd=scale_Nd)
