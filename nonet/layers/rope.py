"""Rotary position embedding (Su et al., 2021), rotating the two halves of a head against each other.

Used by every family through `rope_of`, which reads how the model's context was extended: linearly, by YaRN (Peng et
al., 2023) or by Llama 3's rule. The specification of all four is transformers' `modeling_rope_utils`.
Legend: T tokens, H heads, d rotated width of a head, F = d / 2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nonet.config.checkpoint import ModelSpec, rope_parameters

MOST_TABLED = 1 << 17  # positions: at width 128 in bfloat16 tables of 64 MiB


class Rope:
    """Cosine and sine of positions: tables up to the longest, made once, or for very long ones computed in each step.

    `scaling` is a mapping as `config.checkpoint.rope_parameters` gives it; None: the plain frequencies of `theta`.
    """

    def __init__(
        self,
        width: int,
        theta: float,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        inverse_F, self._factor = frequencies(width, theta, scaling or {"rope_type": "default"})
        self._inverse_F, self._dtype = inverse_F.to(device), dtype
        self._tables: tuple[Tensor, Tensor] | None = None
        if length <= MOST_TABLED:
            self._tables = self._turned(torch.arange(length, device=device))

    def at(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, d]: once a step for all layers."""
        if self._tables is None:
            cos_Td, sin_Td = self._turned(position_T)
        else:
            cos_Td, sin_Td = (table[position_T] for table in self._tables)
        return cos_Td.unsqueeze(1), sin_Td.unsqueeze(1)

    def _turned(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.outer(position_T.float(), self._inverse_F)
        angle = torch.cat([angle, angle], dim=-1)
        return (angle.cos() * self._factor).to(self._dtype), (angle.sin() * self._factor).to(self._dtype)


def rope_of(spec: ModelSpec, width: int, length: int, dtype: torch.dtype, device: torch.device) -> Rope:
    """The rotation that a model's config.json asks for, of `width` numbers a head. Raises ModelError."""
    return Rope(width, spec.rope_theta, length, dtype, device, rope_parameters(spec))


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned by its position's angle."""
    half = x_THd.shape[-1] // 2
    turned = torch.cat([-x_THd[..., half:], x_THd[..., :half]], dim=-1)
    return x_THd * cos + turned * sin


def frequencies(width: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """(angle a position, float32 [F]; factor of cosine and sine), by the rule that `scaling` names."""
    slowness_F = theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    plain_F = 1.0 / slowness_F
    match scaling["rope_type"]:
        case "linear":
            return plain_F / scaling["factor"], 1.0
        case "yarn":
            return _yarn(width, theta, slowness_F, scaling), _yarn_factor(scaling)
        case "llama3":
            return _llama3(plain_F, scaling), 1.0
        case _:
            return plain_F, 1.0


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """How much a context `factor` times longer sharpens attention (equation 22 of the YaRN paper)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(width: int, theta: float, slowness_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Fast angles stay, slow ones are stretched, between them a ramp over the frequencies' numbers."""

    def number_of(turns: float) -> float:
        """The frequency, as a fraction of a number, that makes so many turns in the original context."""
        original = scaling["original_max_position_embeddings"]
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = number_of(scaling.get("beta_fast") or 32), number_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    kept_F = 1 - ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * slowness_F) * (1 - kept_F) + 1.0 / slowness_F * kept_F


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    """DeepSeek gives two weights and moves the second one's part into the scale of attention (`layers.mla`)."""
    given, weight, elsewhere = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if weight and elsewhere:
        return yarn_mscale(scaling["factor"], weight) / yarn_mscale(scaling["factor"], elsewhere)
    return yarn_mscale(scaling["factor"])


def _llama3(plain_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched, short ones stay, those between are mixed."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_F = scaling["original_max_position_embeddings"] / (2 * math.pi / plain_F)  # in the original context
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - kept_F) * plain_F / scaling["factor"] + kept_F * plain_F
