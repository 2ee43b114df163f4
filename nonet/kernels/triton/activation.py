"""silu(gate) * up of a dense MLP, in one pass. Specified by `layers.mlp`. Computed in float32 and rounded once.

Legend: T rows, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before

BLOCK, WARPS = 512, 4  # fastest on an H100


def silu_times(gate_up: Tensor) -> Tensor:
    """[T, I] of gate_up [T, 2I]: gate on the left, up on the right."""
    T, width, gate_up = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.contiguous()
    out = torch.empty((T, width), dtype=gate_up.dtype, device=gate_up.device)
    if T:
        block = min(BLOCK, triton.next_power_of_2(width))
        _silu_times[(T, triton.cdiv(width, block))](gate_up, out, width, BI=block, num_warps=WARPS, **early(out.device))
    return out


@triton.jit
def _silu_times(gate_up, out, width, BI: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    at = gate_up + 2 * t * width + i
    gate = tl.load(at, mask=i < width).to(tl.float32)
    up = tl.load(at + width, mask=i < width).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + t * width + i, act.to(out.dtype.element_ty), mask=i < width)
