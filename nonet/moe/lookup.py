"""From experts to slots: which replica of an expert a token is sent to. One lookup a layer, derived from a placement.

`Even` is here, the rules that follow the load are in `waterfill`; a model asks `Lookups` for its layers'.
Legend: T own tokens, K top-k, L MoE layers, E experts, C most replicas.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nonet.eplb.placement import Placement
from nonet.kernels import triton as gpu


class Lookup(Protocol):
    rank: int  # this one, among the expert-parallel

    def __call__(self, expert_TK: Tensor) -> Tensor:
        """Global slots, int64 [T, K]. Entered by all ranks in each step, also without tokens."""
        ...


class Lookups(Protocol):
    """The lookups of all MoE layers, and what they learn from."""

    learns: bool  # whether `learn` wants to be called

    def of(self, layer: int) -> Lookup:
        """`layer` counts MoE layers."""
        ...

    def learn(self, count_LE: npt.NDArray[np.int64]) -> None:
        """What all ranks' tokens chose since the last time; called by all ranks alike, between steps."""
        ...


class Even:
    """Even use of replicas: this rank's tokens take an expert's replicas in turn, starting at its own number."""

    def __init__(self, placement: Placement, layer: int, rank: int, device: torch.device) -> None:
        slot_EC, count_E = placement.replicas(layer)
        self.slot_EC = torch.from_numpy(slot_EC).to(device)
        self.count_E = torch.from_numpy(count_E).to(device)
        self.rank = rank
        self.replicated = bool(slot_EC.shape[1] > 1)
        self.in_order = not self.replicated and bool((slot_EC[:, 0] == np.arange(len(slot_EC))).all())

    def __call__(self, expert_TK: Tensor) -> Tensor:
        """Deterministic; replicas of an expert get within one token of each other."""
        if self.in_order:
            return expert_TK
        if expert_TK.device.type == "cpu":
            from nonet.kernels.cpu import routing

            return routing.look_up(expert_TK, self.slot_EC, self.count_E, self.rank)
        if gpu.handles(expert_TK):
            from nonet.kernels.triton import lookup

            return lookup.look_up(expert_TK, self.slot_EC, self.count_E, self.rank)
        return self.reference(expert_TK)

    def reference(self, expert_TK: Tensor) -> Tensor:
        """The specification."""
        if not self.replicated:
            return self.slot_EC[expert_TK, 0]
        flat = expert_TK.reshape(-1)
        return self.slot_EC[flat, (turns(flat, len(self.count_E)) + self.rank) % self.count_E[flat]].view_as(expert_TK)


class EvenLookups:
    """`Even` for every layer."""

    learns = False

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        self._each = [Even(placement, layer, rank, device) for layer in range(placement.num_layers)]

    def of(self, layer: int) -> Lookup:
        return self._each[layer]

    def learn(self, count_LE: npt.NDArray[np.int64]) -> None:
        raise AssertionError("nothing is learned")


def turns(expert_P: Tensor, num_experts: int) -> Tensor:
    """int64 [P]: how often each pair's expert came before it."""
    order = torch.argsort(expert_P, stable=True)
    count_E = torch.bincount(expert_P, minlength=num_experts)
    first = (torch.cumsum(count_E, 0) - count_E)[expert_P[order]]
    turn = torch.empty_like(expert_P)
    turn[order] = torch.arange(len(expert_P), device=expert_P.device) - first
    return turn
