"""Rotary position embedding (Su et al., 2021), rotating the two halves of a head against each other.

Legend: T tokens, H heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """Tables of cosine and sine up to the longest position, made once."""

    def __init__(
        self, head_dim: int, theta: float, max_position: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        angle = torch.outer(torch.arange(max_position).float(), inverse)
        angle = torch.cat([angle, angle], dim=-1)
        self.cos, self.sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)

    def at(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, d]: looked up once a step for all layers."""
        return self.cos[position_T].unsqueeze(1), self.sin[position_T].unsqueeze(1)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned by its position's angle."""
    half = x_THd.shape[-1] // 2
    turned = torch.cat([-x_THd[..., half:], x_THd[..., :half]], dim=-1)
    return x_THd * cos + turned * sin
