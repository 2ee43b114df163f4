"""Root-mean-square normalisation, with the residual added before if there is one. Specified by `layers.norm`.

A program has a row, which stays in its registers: x is read once. Everything is summed in float32 and rounded once.
Legend: N rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Over the last dimension of x; rows may lie apart. The result is contiguous."""
    if x.dim() != 2 or x.stride(1) != 1:
        return rms_norm(x.contiguous().view(-1, x.shape[-1]), weight_D, eps).view(x.shape)
    out_ND = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight_D, None, out_ND, eps)
    return out_ND


def add_rms_norm(x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, its norm) for x and y [N, D]."""
    x_ND, y_ND = x_ND.contiguous(), y_ND.contiguous()
    total_ND, out_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    _launch(x_ND, y_ND, weight_D, total_ND, out_ND, eps)
    return total_ND, out_ND


def _launch(x: Tensor, y: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float) -> None:
    N, D = x.shape
    if N:
        block = triton.next_power_of_2(D)
        _norm[(N,)](x, y, weight, total, out, x.stride(0), D, eps, BD=block, num_warps=warps(block), **early(x.device))


def warps(block: int) -> int:
    """Of a row: fastest on an H100 with 16 numbers a thread."""
    return min(16, max(1, block // 512))


@triton.jit
def _norm(x, y, weight, total, out, stride, D, eps, BD: tl.constexpr, EARLY: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    wait_for_the_kernel_before(EARLY)
    row = tl.load(x + n * stride + d, mask=d < D, other=0.0).to(tl.float32)
    if y is not None:
        row += tl.load(y + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        both = row.to(total.dtype.element_ty)
        tl.store(total + n * D + d, both, mask=d < D)
        row = both.to(tl.float32)  # what later layers see is what is normed
    weights = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / D + eps)
    tl.store(out + n * D + d, (row * scale * weights).to(out.dtype.element_ty), mask=d < D)
