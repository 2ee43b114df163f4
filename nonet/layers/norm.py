"""Root-mean-square normalisation (Zhang and Sennrich, 2019), in float32 inside.

Legend: N rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonet.kernels import cpu
from nonet.kernels import triton as gpu


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    if cpu.handles(x_ND):
        from nonet.kernels.cpu import norm

        return norm.rms_norm(x_ND, weight_D, eps)
    if gpu.handles(x_ND):
        from nonet.kernels.triton import norm as on_gpu

        return on_gpu.rms_norm(x_ND, weight_D, eps)
    return rms_norm_reference(x_ND, weight_D, eps)


def add_rms_norm(x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, the norm of that): what stands between two blocks."""
    if cpu.handles(x_ND):
        from nonet.kernels.cpu import norm

        return norm.add_rms_norm(x_ND, y_ND, weight_D, eps)
    if gpu.handles(x_ND):
        from nonet.kernels.triton import norm as on_gpu

        return on_gpu.add_rms_norm(x_ND, y_ND, weight_D, eps)
    total_ND = x_ND + y_ND
    return total_ND, rms_norm_reference(total_ND, weight_D, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification, for x of any shape; the weight broadcasts, so heads may have weights of their own."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype) * weight
