"""Counts this rank's tokens per expert, and per slot where that is asked for. Padding and dummy tokens are not load.

Legend: L MoE layers, E experts, G global slots, T tokens, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonet.kernels import triton as gpu


class LoadCounter:
    """Owned by the worker, added to by every MoE layer, read between steps. Counts stay on the device.

    `count_LE` is for metrics and planners and always counts; `slot_LG`, which replica each went to, only while
    somebody records it (None: nobody).
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.count_LE = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)
        self.slot_LG: Tensor | None = None  # int64

    def add(self, layer: int, expert_TK: Tensor, slot_TK: Tensor) -> None:
        """Tokens of one layer, and the global slots they go to."""
        _count(expert_TK, self.count_LE[layer])
        if self.slot_LG is not None:
            _count(slot_TK, self.slot_LG[layer])


def _count(index_TK: Tensor, count: Tensor) -> None:
    """Add to `count` how often each index occurs."""
    if index_TK.device.type == "cpu":
        from nonet.kernels.cpu import routing

        routing.count_experts(index_TK, count)
        return
    if gpu.handles(index_TK):
        from nonet.kernels.triton import lookup

        lookup.count(index_TK, count)
        return
    count_reference(index_TK, count)


def count_reference(index_TK: Tensor, count: Tensor) -> None:
    """The specification."""
    ones = torch.ones(index_TK.numel(), dtype=torch.int64, device=index_TK.device)
    count.scatter_add_(0, index_TK.reshape(-1), ones)
