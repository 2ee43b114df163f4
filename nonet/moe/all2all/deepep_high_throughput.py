"""Adapter to DeepEP's kernels for many tokens: prefill, over NVLink and between hosts.

The host waits for the counts of what comes, so nothing is captured. A token goes once to each rank, which weighs and
adds its slots' results. See `_deepep`. Legend: see moe/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nonet.comm.group import Pending
from nonet.errors import ConfigError
from nonet.kernels.fp8 import quantize_rows
from nonet.moe.all2all import _deepep
from nonet.moe.all2all._library import EvenIds
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts, group_by_slot

NAME = "deepep_high_throughput"
ONE_DOMAIN = 8  # ranks that DeepEP takes to share NVLink
unavailable = _deepep.unavailable


def create(spec: All2AllSpec) -> All2All:
    """Raises ConfigError for what DeepEP does not do."""
    _deepep.check(NAME, spec)
    return HighThroughput(spec)


@dataclass(frozen=True, slots=True)
class _Ticket:
    handle: Any  # DeepEP's
    num_tokens: int


class HighThroughput:
    captures = False
    takes: Takes = "rows"

    def __init__(self, spec: All2AllSpec) -> None:
        from deep_ep import Buffer

        self.spec = spec
        self._ids = EvenIds(spec, absent=-1)
        size, width = spec.group.size, spec.hidden_size * spec.dtype.itemsize
        try:
            configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
        except AssertionError as error:
            raise ConfigError("all2all_backend", NAME, f"DeepEP has no settings for {size} ranks") from error
        between = max(config.get_rdma_buffer_size_hint(width, size) for config in configs) if size > ONE_DOMAIN else 0
        within = max(config.get_nvl_buffer_size_hint(width, size) for config in configs)
        self._buffer = _deepep.open_buffer(spec, num_nvl_bytes=within, num_rdma_bytes=between)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        x, id_TK, weight = _deepep.never_none(x_TD, self._ids(slot_TK), weight_TK)
        by_rank, by_host, by_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            id_TK, self.spec.group.size * self._ids.most
        )
        received, here_NK, weight_NK, _, handle, _ = self._buffer.dispatch(
            quantize_rows(x) if self.spec.fp8 else x,
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_host,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=by_expert,
            topk_idx=id_TK,
            topk_weights=weight,
        )
        ticket = _Ticket(handle, len(x_TD))

        def finish() -> Dispatched:
            x_ND, scale_Nd = received if self.spec.fp8 else (received, None)
            sent = group_by_slot(x_ND, here_NK.long(), weight_NK, self.spec.num_slots, ticket)
            return replace(sent, scale_Nd=scale_Nd)

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        out, _, _ = self._buffer.combine(y.contiguous(), ticket.handle)
        return Pending(lambda: out[: ticket.num_tokens])

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        """DeepEP raises by itself when a rank stays away."""

    def close(self) -> None:
        self._buffer.destroy()
