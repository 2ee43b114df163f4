"""Shared by the all-to-alls that show every rank all rows: packing a row with its slots and weights.

A packed row is its values, K int32 slots and K float32 weights as bytes, so that one collective moves all three.
Legend: see moe/base.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonet.moe.base import All2AllSpec


def pack(x_ND: Tensor, slot_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """[N, bytes] uint8."""
    return torch.cat([_as_bytes(x_ND), _as_bytes(slot_NK.int()), _as_bytes(weight_NK.float())], dim=1)


def _as_bytes(x: Tensor) -> Tensor:
    """Through one dimension: of a [0, 1] tensor the strides are anything, and a view by bytes would refuse them."""
    return x.reshape(-1).view(torch.uint8).view(x.shape[0], x.shape[1] * x.dtype.itemsize)


def unpack(packed: Tensor, spec: All2AllSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(x_ND, slot_NK int64, weight_NK float32)."""
    width = spec.hidden_size * spec.dtype.itemsize
    x_ND, slot_NK, weight_NK = packed.split([width, 4 * spec.top_k, 4 * spec.top_k], dim=1)
    return (
        x_ND.contiguous().view(spec.dtype),
        slot_NK.contiguous().view(torch.int32).long(),
        weight_NK.contiguous().view(torch.float32),
    )


def packed_width(spec: All2AllSpec) -> int:
    return spec.hidden_size * spec.dtype.itemsize + 8 * spec.top_k


def spread_pairs(y_MD: Tensor, pair_NK: Tensor) -> Tensor:
    """[N, K * D]: each pair's row at its (row, k), zero for pairs of other ranks: summing over ranks adds nothing."""
    N, K = pair_NK.shape
    out = y_MD.new_zeros((N * K, y_MD.shape[1]))
    here = (pair_NK >= 0).reshape(-1).nonzero().squeeze(1)
    out[here] = y_MD[pair_NK.reshape(-1)[here]]
    return out.view(N, K * y_MD.shape[1])


def sum_spread(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, D] float32 from [T, K, D]: weighted, in k order."""
    out = torch.zeros((y_TKD.shape[0], y_TKD.shape[2]), dtype=torch.float32, device=y_TKD.device)
    for k in range(y_TKD.shape[1]):
        out += y_TKD[:, k].float() * weight_TK[:, k].unsqueeze(1)
    return out
