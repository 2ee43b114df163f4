"""From experts to slots: which replica of an expert a token is sent to. One lookup a layer, derived from a placement.

Legend: T own tokens, K top-k, E experts, C most replicas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonet.eplb.placement import Placement


class Lookup:
    """Even use of replicas: this rank's tokens take an expert's replicas in turn, starting at its own number."""

    def __init__(self, placement: Placement, layer: int, rank: int, device: torch.device) -> None:
        slot_EC, count_E = placement.replicas(layer)
        self.slot_EC = torch.from_numpy(slot_EC).to(device)
        self.count_E = torch.from_numpy(count_E).to(device)
        self.rank = rank
        self.replicated = bool(slot_EC.shape[1] > 1)

    def __call__(self, expert_TK: Tensor) -> Tensor:
        """Global slots, int64 [T, K]. Deterministic; replicas of an expert get within one token of each other."""
        if expert_TK.device.type == "cpu":
            from nonet.kernels.cpu import routing

            return routing.look_up(expert_TK, self.slot_EC, self.count_E, self.rank)
        return self.reference(expert_TK)

    def reference(self, expert_TK: Tensor) -> Tensor:
        """The specification."""
        if not self.replicated:
            return self.slot_EC[expert_TK, 0]
        flat = expert_TK.reshape(-1)
        order = torch.argsort(flat, stable=True)
        count_E = torch.bincount(flat, minlength=len(self.count_E))
        first = (torch.cumsum(count_E, 0) - count_E)[flat[order]]
        turn = torch.empty_like(flat)
        turn[order] = torch.arange(len(flat), device=flat.device) - first  # how often the expert came before
        return self.slot_EC[flat, (turn + self.rank) % self.count_E[flat]].view_as(expert_TK)
