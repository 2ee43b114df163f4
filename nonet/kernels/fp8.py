"""Weights in 8-bit floats with a float32 factor for each block, as DeepSeek-V3's checkpoints hold them.

Section 3.3 of its report (arXiv:2412.19437): e4m3, blocks of 128 x 128, weight = number * factor. Used by the loader,
the expert kernels and `nonet quantize`.
Legend: N rows, K columns, b the side of a block, n and k blocks that rows and columns touch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonet.kernels import cpu

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 holds
LEAST = 2.0**-100  # a block of zeros still gets a factor that can be divided by


def quantize(weight_NK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], float32 factors [n, k]): the largest number of each block becomes 448.

    Raises ValueError if a number is not finite.
    """
    N, K = weight_NK.shape
    out = torch.empty((N, K), dtype=FP8, device=weight_NK.device)
    scale_nk = torch.empty((-(-N // block), -(-K // block)), device=weight_NK.device)
    over = -K % block
    for n in range(len(scale_nk)):
        rows = slice(n * block, (n + 1) * block)
        part_bkb = torch.nn.functional.pad(weight_NK[rows].float(), (0, over)).unflatten(1, (-1, block))
        scale_nk[n] = _factor(part_bkb.abs().amax(dim=(0, 2)))
        part_bkb = (part_bkb / scale_nk[n].unsqueeze(1)).clamp(-LARGEST, LARGEST)
        out[rows] = part_bkb.flatten(1)[:, :K].to(FP8)
    if not scale_nk.isfinite().all():
        raise ValueError("a number is not finite")
    return out, scale_nk


def dequantize(
    weight_NK: Tensor,
    scale_nk: Tensor,
    block: int,
    dtype: torch.dtype,
    *,
    first: tuple[int, int] = (0, 0),
    out: Tensor | None = None,
) -> Tensor:
    """[N, K] in `dtype`: the product is taken in float32 and rounded once.

    `first` is where row 0 and column 0 lie in their blocks: a part of a weight need not begin with a block. Factors of
    blocks further down than the rows go are let be.
    """
    N, K = weight_NK.shape
    out = torch.empty((N, K), dtype=dtype, device=weight_NK.device) if out is None else out
    if cpu.handles(out) and all(tensor.is_contiguous() for tensor in (weight_NK, scale_nk, out)):
        from nonet.kernels.cpu import fp8

        fp8.dequantize(weight_NK, scale_nk, block, first, out)
        return out
    return dequantize_reference(weight_NK, scale_nk, block, first, out)


def dequantize_reference(
    weight_NK: Tensor, scale_nk: Tensor, block: int, first: tuple[int, int], out: Tensor
) -> Tensor:
    """The specification of the above."""
    (N, K), start = weight_NK.shape, 0
    for scale_k in scale_nk:
        if start == N:
            break
        end = min(N, start + block - (first[0] if start == 0 else 0))
        scale_K = scale_k.repeat_interleave(block)[first[1] : first[1] + K]
        out[start:end] = weight_NK[start:end].float().mul_(scale_K)
        start = end
    return out


def blocks_of(span: tuple[int, int], block: int) -> tuple[int, int]:
    """The blocks that a span touches, first and last + 1."""
    return span[0] // block, -(-span[1] // block)


ROW_BLOCK = 128  # numbers of a row that share a factor


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, D], float32 factors [N, D / 128]): the largest of each 128 numbers of a row becomes 448.

    As DeepSeek-V3 sends activations (arXiv:2412.19437, section 3.3). D is a multiple of 128. Numbers are multiplied by
    the inverse of their factor, rounded to float32: on GPUs a division for each of them would take longer than sending.
    """
    part_Ndb = x_ND.float().unflatten(1, (-1, ROW_BLOCK))
    scale_Nd = _factor(part_Ndb.abs().amax(dim=2))
    return (part_Ndb * scale_Nd.reciprocal().unsqueeze(2)).flatten(1).to(FP8), scale_Nd


def dequantize_rows(x_ND: Tensor, scale_Nd: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, D] in `dtype`: the product is taken in float32 and rounded once."""
    return (x_ND.float().unflatten(1, (-1, ROW_BLOCK)) * scale_Nd.unsqueeze(2)).flatten(1).to(dtype)


def _factor(largest: Tensor) -> Tensor:
    """By a tensor: on GPUs PyTorch divides by a number as it multiplies by the inverse, a last bit off."""
    return largest.clamp(min=LEAST) / largest.new_full((), LARGEST)
