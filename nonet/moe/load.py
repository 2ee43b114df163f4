"""Counts this rank's tokens per expert, on the device. Padding and dummy tokens are not load.

Legend: L MoE layers, E experts, T tokens, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LoadCounter:
    """Owned by the worker, added to by every MoE layer, read between steps."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.count_LE = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)

    def add(self, layer: int, expert_TK: Tensor) -> None:
        if expert_TK.device.type == "cpu":
            from nonet.kernels.cpu import routing

            routing.count_experts(expert_TK, self.count_LE[layer])
            return
        ones = torch.ones(expert_TK.numel(), dtype=torch.int64, device=expert_TK.device)
        self.count_LE[layer].scatter_add_(0, expert_TK.reshape(-1), ones)
