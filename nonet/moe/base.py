"""The joints of the MoE layer: what an all-to-all and an expert kernel must do, and what passes between them.

Implemented by the files in `all2all/` and `experts/`, composed by `layer`. Neither knows the other's insides.
Legend: T own tokens, D hidden, K top-k, N received rows, M (row, slot) pairs, S slots on this rank, G all slots,
R expert-parallel ranks, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from nonet.comm.group import Group, Pending
from nonet.config.fleet import Fleet
from nonet.errors import ConfigError
from nonet.kernels import cpu, fp8
from nonet.kernels import triton as gpu
from nonet.weights.slots import SlotWeights

Takes = Literal["pairs", "rows"]


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows that arrived for this rank's slots, and the pairs of (row, slot) to compute, grouped by slot.

    N and M are upper bounds; rows that no pair reads are undefined. Slot s owns the pairs
    `start_S[s] : start_S[s] + count_S[s]`.
    """

    x_ND: Tensor
    row_M: Tensor  # int64: the row each pair reads
    weight_M: Tensor  # float32: its router weight
    pair_NK: Tensor  # int64: the pair of each (row, k), or -1 if that slot is on another rank
    start_S: Tensor  # int64
    count_S: Tensor  # int64
    ticket: object  # the backend's own, read only by its combine
    out: Tensor | None = None  # [N, D]: sums of a row that experts lay here, combine need not copy
    scale_Nd: Tensor | None = None  # float32: x_ND is e4m3, with a factor for each 128 columns of a row

    @property
    def dtype(self) -> torch.dtype:
        """The model's: rows of bfloat16 models alone travel in FP8."""
        return self.x_ND.dtype if self.scale_Nd is None else torch.bfloat16

    def rows(self) -> Tensor:
        """x_ND as numbers of the model's type."""
        return self.x_ND if self.scale_Nd is None else fp8.dequantize_rows(self.x_ND, self.scale_Nd, self.dtype)

    def plain(self) -> Dispatched:
        """The same without FP8, for experts that do not take it."""
        return self if self.scale_Nd is None else replace(self, x_ND=self.rows(), scale_Nd=None)


class All2All(Protocol):
    """Moves tokens to the ranks that hold their slots, and results back. Built by a backend's `create(spec)`.

    Every rank of the group calls dispatch and combine equally often and in the same order, also with zero tokens.
    A token whose slots are -1 does not travel, and its result is zero.
    """

    captures: bool  # no host synchronisation inside: safe in CUDA graphs
    takes: Takes  # what combine wants of the experts: one unweighted row a pair, or weighted sums a row

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        """Start sending. x_TD in the model's dtype, slot_TK int64 global slots, weight_TK float32.

        `rows` is the token count T of every rank, the same list on all of them.
        """
        ...

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        """Start bringing back y ([M, D] or [N, D], as `takes` says); the result is [T, D] in x's dtype."""
        ...

    def gather_counts(self, count_E: Tensor) -> Tensor:
        """int64 [R, E] on the host: every rank's counts of this step. Entered by all ranks, before they dispatch."""
        ...

    def check(self) -> None:
        """Raise CommTimeout if a wait on the device gave up on a rank. Called once a step's results are on the host."""
        ...

    def close(self) -> None:
        """Give back what the backend holds."""
        ...


class Experts(Protocol):
    """Computes down(silu(gate(x)) * up(x)) for each pair. Built by a backend's `create()`."""

    def check(self, weights: SlotWeights) -> None:
        """Called with each layer's slots once they are loaded: raise ConfigError if they are of a kind not done."""
        ...

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        """y_MD (one unweighted row a pair), or y_ND (weighted, summed over this rank's slots in k order)."""
        ...


@dataclass(frozen=True)
class All2AllSpec:
    """What a backend is built for. `max_rows` bounds the tokens of one rank in one dispatch."""

    group: Group
    fleet: Fleet
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    max_rows: int
    exact: bool  # one row a pair, summed in k order in float32 at the token's own rank
    fp8: bool = False  # rows travel in FP8, with a factor for each 128 numbers

    @property
    def first_slot(self) -> int:
        return self.fleet.first_slot[self.group.rank]

    @property
    def num_slots(self) -> int:
        """Slots on this rank."""
        return self.fleet.slots_by_rank[self.group.rank]


def check_fp8(spec: All2AllSpec) -> None:
    """Raises ConfigError where rows cannot travel in FP8."""
    if spec.fp8 and (spec.dtype != torch.bfloat16 or spec.hidden_size % fp8.ROW_BLOCK):
        remedy = f"rows travel in FP8 only in bfloat16 models of a width that {fp8.ROW_BLOCK} divides"
        raise ConfigError("fp8_dispatch", True, remedy)


def gather_counts(group: Group, count_E: Tensor) -> Tensor:
    """`All2All.gather_counts` by one collective."""
    return group.all_gather_rows(count_E.unsqueeze(0), [1] * group.size).wait().cpu()


def group_by_slot(x_ND: Tensor, slot_NK: Tensor, weight_NK: Tensor, num_slots: int, ticket: object) -> Dispatched:
    """Sort the pairs of received rows by slot. This rank's slots are 0..S-1; whatever lies outside is elsewhere."""
    if gpu.handles(weight_NK):
        from nonet.kernels.triton import grouping

        return Dispatched(x_ND, *grouping.group(slot_NK, weight_NK, num_slots), ticket)
    if cpu.handles(weight_NK):
        from nonet.kernels.cpu import routing

        return Dispatched(x_ND, *routing.group(slot_NK, weight_NK, 0, num_slots), ticket)
    return group_by_slot_reference(x_ND, slot_NK, weight_NK, num_slots, ticket)


def group_by_slot_reference(
    x_ND: Tensor, slot_NK: Tensor, weight_NK: Tensor, num_slots: int, ticket: object
) -> Dispatched:
    """The specification of `group_by_slot`."""
    N, K = slot_NK.shape
    flat = slot_NK.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_slots), flat, num_slots)
    order = torch.argsort(key, stable=True)
    count = torch.bincount(key, minlength=num_slots + 1)[:num_slots]
    place = torch.empty_like(order)
    place[order] = torch.arange(N * K, device=order.device)
    pair_NK = place.masked_fill_(key == num_slots, -1).view(N, K)
    return Dispatched(
        x_ND=x_ND,
        row_M=order // K,
        weight_M=weight_NK.reshape(-1).index_select(0, order),
        pair_NK=pair_NK,
        start_S=torch.cumsum(count, 0) - count,
        count_S=count,
        ticket=ticket,
    )


def sum_pairs(y_MD: Tensor, sent: Dispatched) -> Tensor:
    """[N, D] float32: each row's pairs, weighted and summed in k order. What no pair reads counts for nothing."""
    N, K = sent.pair_NK.shape
    out = torch.zeros((N, y_MD.shape[1]), dtype=torch.float32, device=y_MD.device)
    if y_MD.shape[0] == 0:
        return out
    if y_MD.device.type == "cpu":  # the same sums touching only pairs of this rank; the order of adding is the index's
        flat = sent.pair_NK.reshape(-1)
        here = (flat >= 0).nonzero().squeeze(1)
        pair = flat.index_select(0, here)
        weight = sent.weight_M.index_select(0, pair).unsqueeze(1)
        return out.index_add_(0, here // K, y_MD.index_select(0, pair).float().mul_(weight))
    for k in range(K):
        pair = sent.pair_NK[:, k]
        at = pair.clamp(min=0)
        out += torch.where((pair >= 0).unsqueeze(1), y_MD[at].float() * sent.weight_M[at].unsqueeze(1), 0.0)
    return out
