"""Adapter to FlashInfer's one-sided MoE all-to-all, for the GPUs of one NVLink domain.

Its protocol is TensorRT-LLM's: a token is pushed once into each target's rank-major buffer, flags carry an epoch, and
combine pulls and adds partial sums in the tokens' type. FlashInfer compiles its kernels at first use; a rank that stays
away ends in its trap after minutes. Interface: flashinfer.comm's moe_a2a_*, version 0.6.12.
Legend: see moe/base.py; R ranks, B rows that one rank may send in this dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nonet.comm.group import Group, Pending
from nonet.errors import ConfigError
from nonet.kernels.fp8 import FP8, quantize_rows
from nonet.moe.all2all._library import EvenIds, missing, needs_cuda, row_bytes
from nonet.moe.all2all._rows import spread_pairs, sum_spread
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, check_fp8, gather_counts, group_by_slot

NAME = "flashinfer_all2allv"
TOP_K = (1, 2, 4, 6, 8, 10, 16, 22)  # that its kernels are compiled for; others are padded
MOST_RANKS = 64
ROWS = 16  # B is a multiple of it, so that every part of a buffer begins at 16 bytes, whatever its width


def unavailable() -> str | None:
    return missing("flashinfer", "pip install 'nonet[flashinfer]'")


def create(spec: All2AllSpec) -> All2All:
    """Raises ConfigError for what FlashInfer's kernels do not do."""
    needs_cuda(NAME, spec)
    check_fp8(spec)
    if spec.top_k > TOP_K[-1]:
        raise ConfigError("all2all_backend", NAME, f"sends to at most {TOP_K[-1]} slots a token, not {spec.top_k}")
    if spec.group.size > MOST_RANKS:
        raise ConfigError("all2all_backend", NAME, f"connects at most {MOST_RANKS} ranks, not {spec.group.size}")
    return FlashInfer(spec)


@dataclass(frozen=True, slots=True)
class _Ticket:
    rows: int  # B
    weight_TK: Tensor


class FlashInfer:
    """One exchange at a time: each dispatch is followed by its combine."""

    def __init__(self, spec: All2AllSpec) -> None:
        from flashinfer import comm
        from flashinfer.comm.mnnvl import MnnvlConfig

        group, R, K, width = spec.group, spec.group.size, spec.top_k, spec.hidden_size * spec.dtype.itemsize
        self.spec, self._comm = spec, comm
        self.takes: Takes = "pairs" if spec.exact else "rows"
        self.captures = not spec.exact
        self._top_k = next(k for k in TOP_K if k >= K)
        at_home = group.rank * max(spec.fleet.slots_by_rank)  # where a token of slots -1 stays
        self._ids = EvenIds(spec, absent=at_home)
        most_rows, back = _rounded(spec.max_rows), width * (K if spec.exact else 1)
        sent = row_bytes(spec) + 8 * K  # a slot and a weight each
        size = comm.moe_a2a_get_workspace_size_per_rank(R, most_rows, sent, back)
        # Results lie behind the most rows there can be. FlashInfer's own class lays them behind the rows of this
        # dispatch: there the next one, if larger, could overwrite what another rank still pulls.
        self._back_at = size - _up(R * most_rows * back, 128)
        self._space: Any = comm.MoeAlltoAll(
            comm.Mapping(world_size=R, rank=group.rank, tp_size=R, moe_ep_size=R, moe_tp_size=1),
            max_num_tokens=most_rows,
            top_k=self._top_k,
            num_experts=R * self._ids.most,
            workspace_size_per_rank=size,
            mnnvl_config=MnnvlConfig(comm_backend=_Ranks(group)),
        )
        self._place: Any = self._space.workspace, self._space.metainfo
        group.barrier()  # everyone has zeroed the flags: one that is raised before would be lost

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        group, B, ids = self.spec.group, _rounded(max(rows)), self._ids
        id_TK = ids(slot_TK).int()
        if self._top_k > id_TK.shape[1]:  # a target that is named again gets nothing more
            id_TK = torch.cat([id_TK, id_TK[:, :1].expand(-1, self._top_k - id_TK.shape[1])], dim=1)
        x_TD, *scale = quantize_rows(x_TD) if self.spec.fp8 else (x_TD,)
        payload = [x_TD.contiguous().view(torch.uint8) if scale else x_TD.contiguous(), *scale]
        payload += [slot_TK.int(), weight_TK.contiguous()]
        received, _ = self._comm.moe_a2a_dispatch(
            id_TK, payload, *self._place, B, group.rank, group.size, self._top_k, group.size * ids.most
        )
        self._comm.moe_a2a_sanitize_expert_ids(received[-2], *self._place, group.rank, -1)  # in rows that nobody sent
        ticket = _Ticket(B, weight_TK.masked_fill(slot_TK < 0, 0))

        def finish() -> Dispatched:
            x_ND, *scale_Nd, slot_NK, weight_NK = (part.flatten(0, 1) for part in received)
            here_NK = slot_NK.long() - self.spec.first_slot
            sent = group_by_slot(x_ND, here_NK, weight_NK, self.spec.num_slots, ticket)
            return replace(sent, x_ND=x_ND.view(FP8), scale_Nd=scale_Nd[0]) if scale_Nd else sent

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket, group = sent.ticket, self.spec.group
        assert isinstance(ticket, _Ticket)
        T, B = len(ticket.weight_TK), ticket.rows
        if self.takes == "pairs":
            y = spread_pairs(y, sent.pair_NK)
        back = self._comm.moe_a2a_combine(
            y.reshape(group.size, B, -1), T, *self._place, B, group.rank, group.size, self._top_k, self._back_at
        )
        if self.takes == "rows":
            return Pending(lambda: back)
        y_TKD = back.view(*ticket.weight_TK.shape, self.spec.hidden_size)
        return Pending(lambda: sum_spread(y_TKD, ticket.weight_TK).to(self.spec.dtype))

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        """A wait that gives up traps, and so is an error of the GPU."""

    def close(self) -> None:
        """Peers that still read this rank's memory keep it mapped themselves."""
        self._space._reset_workspace()  # else FlashInfer keeps it as long as the process lives
        self._space = self._place = None


class _Ranks:
    """What FlashInfer asks of a communicator while it maps the ranks' memory (flashinfer.comm.mnnvl.CommBackend)."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802 - the library's names
        return self._group.rank

    def Get_size(self) -> int:  # noqa: N802
        return self._group.size

    def allgather(self, data: Any) -> list[Any]:
        return self._group.all_gather_object(data)

    def bcast(self, data: Any, root: int) -> Any:
        return self._group.all_gather_object(data)[root]

    def barrier(self) -> None:
        self._group.barrier()

    def Split(self, color: int, key: int) -> _Ranks:  # noqa: N802
        return self  # these ranks are one domain already


def _rounded(rows: int) -> int:
    return _up(max(1, rows), ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
