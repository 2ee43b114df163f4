"""The dense gated MLP, its intermediate width split over the tensor-parallel ranks, or whole.

Legend: T rows of all tensor-parallel ranks, t this rank's, D hidden.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.comm.group import Group
from nonet.config.fleet import split_evenly
from nonet.kernels import triton as gpu
from nonet.kernels.linear import linear, pack
from nonet.weights.loader import Checkpoint, Range


def span_of(width: int, parts: int, part: int) -> Range:
    """Part `part` of a width split as evenly as it goes."""
    bounds = (0, *accumulate(split_evenly(width, parts)))
    return bounds[part], bounds[part + 1]


class GatedMlp:
    """down(silu(gate(x)) * up(x)), of a part of its width, or of the whole: shared experts are one on each rank."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, span: Range) -> None:
        parts = [checkpoint.read(f"{prefix}.{part}_proj.weight", rows=span) for part in ("gate", "up")]
        self.gate_up = pack(torch.cat(parts))
        self.down = pack(checkpoint.read(f"{prefix}.down_proj.weight", columns=span))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return linear(silu_times(linear(x_TD, self.gate_up)), self.down)


def silu_times(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, I] of [T, 2I], gate on the left."""
    if gpu.handles(gate_up):
        from nonet.kernels.triton import activation

        return activation.silu_times(gate_up)
    return silu_times_reference(gate_up)


def silu_times_reference(gate_up: Tensor) -> Tensor:
    """The specification."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class DenseMlp:
    """Gathers rows, computes its slice, and scatters the sum back to the rows' ranks."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, intermediate_size: int, tp: Group) -> None:
        self.tp = tp
        checkpoint.at_most(f"{prefix}.gate_proj.weight", 0, intermediate_size)
        self.slice = GatedMlp(checkpoint, prefix, span_of(intermediate_size, tp.size, tp.rank))

    def forward(self, x_tD: Tensor, rows: tuple[int, ...]) -> Tensor:
        x_TD = self.tp.all_gather_rows(x_tD, rows).wait()
        return self.tp.reduce_scatter_rows(self.slice(x_TD), rows).wait()
