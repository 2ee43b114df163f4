"""Shared by the all-to-alls that send a row only where it is needed: who gets which rows, and how results add up.

A token goes once to each rank that holds at least one of its slots. Legend: see moe/base.py; P sent rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.moe.base import All2AllSpec


@dataclass(frozen=True, slots=True)
class Route:
    """Sent rows in order of target rank, then token: row p is token `token_P[p]`; rank r gets `counts[r]` of them."""

    token_P: Tensor
    counts: list[int]
    rank_TK: Tensor  # the rank of each slot, or R for slots -1


class Router:
    """Finds routes for a fixed placement of slots on ranks."""

    def __init__(self, spec: All2AllSpec) -> None:
        self.num_ranks = spec.fleet.num_ranks
        self._ends = torch.tensor(spec.fleet.first_slot[1:], device=spec.group.device)
        self._ranks = torch.arange(self.num_ranks, device=spec.group.device).view(-1, 1, 1)

    def route(self, slot_TK: Tensor) -> Route:
        rank_TK = torch.bucketize(slot_TK, self._ends, right=True).masked_fill_(slot_TK < 0, self.num_ranks)
        goes_RT = (rank_TK == self._ranks).any(dim=2)
        return Route(goes_RT.nonzero()[:, 1], goes_RT.sum(dim=1).tolist(), rank_TK)


def add_rows(parts: Sequence[Tensor], route: Route, num_tokens: int) -> Tensor:
    """[T, D] float32: the partial sums of each token, added in rank order; part r came from rank r."""
    width, device = parts[0].shape[1], parts[0].device
    out = torch.zeros((num_tokens, width), dtype=torch.float32, device=device)
    for token, part in zip(route.token_P.split(route.counts), parts, strict=True):
        if len(part):
            out.index_add_(0, token, part.float())  # a token stands once in a part: no race on GPUs
    return out


def place_pairs(back_QD: Tensor, route: Route) -> Tensor:
    """[T, K, D] from pair rows that came back in order of rank, token, k; zero for slots -1."""
    T, K = route.rank_TK.shape
    flat = route.rank_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)[: back_QD.shape[0]]
    out = back_QD.new_zeros((T * K, back_QD.shape[1]))
    out[order] = back_QD
    return out.view(T, K, back_QD.shape[1])
