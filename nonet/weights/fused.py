"""Fills expert slots from checkpoints that hold all experts of a layer in one tensor (Llama 4, gpt-oss).

Used by those families while they load. Legend: see weights/slots.py; E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nonet.errors import ModelError
from nonet.weights.loader import Checkpoint, Range
from nonet.weights.slots import Activation, SlotWeights


def fill_fused_slots(
    checkpoint: Checkpoint,
    prefix: str,
    experts: Sequence[int],
    span: Range,
    whole: int | None = None,
    *,
    interleaved: bool = False,
    activation: Activation = "silu",
) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I.

    `prefix.gate_up_proj` is [E, D, 2I], gate's columns before up's, or in turns if `interleaved`; `prefix.down_proj`
    is [E, I, D]. Where `prefix.gate_up_proj_bias` [E, 2I] is there, so is `prefix.down_proj_bias` [E, D].
    whole: I, as config.json says. Raises ModelError if a tensor is missing, larger, or they do not fit together.
    """
    if not experts:
        return SlotWeights((), (), activation=activation)
    both, back, width = f"{prefix}.gate_up_proj", f"{prefix}.down_proj", span[1] - span[0]
    E, D, twice = _dimensions(checkpoint, both)
    if whole is not None:
        checkpoint.at_most(both, 2, 2 * whole)
    has_bias, S = f"{both}_bias" in checkpoint, len(experts)
    shapes: dict[str, tuple[int, ...]] = {back: (E, twice // 2, D)}
    if has_bias:
        shapes |= {f"{both}_bias": (E, twice), f"{back}_bias": (E, D)}
    if twice % 2 or span[1] > twice // 2 or any(checkpoint.shape(name) != shape for name, shape in shapes.items()):
        raise ModelError(f"{checkpoint.folder}: {both}, {', '.join(shapes)} have shapes that do not fit together")
    new = partial(torch.zeros, dtype=checkpoint.dtype, device=checkpoint.device)
    gate_up_SID, down_SDI = new((S, 2 * width, D)), new((S, D, width))
    gate_up_bias_SI, down_bias_SD = new((S, 2 * width)), new((S, D))
    for slot, expert in enumerate(experts):
        _read_both(checkpoint, both, expert, span, interleaved, gate_up_SID[slot])
        checkpoint.read(back, rows=span, index=expert, transposed=True, out=down_SDI[slot])
        if has_bias:
            _read_both(checkpoint, f"{both}_bias", expert, span, interleaved, gate_up_bias_SI[slot])
        if has_bias and span[0] == 0:  # slices of an expert are summed: one of them brings it
            checkpoint.read(f"{back}_bias", index=expert, out=down_bias_SD[slot])
    slots = replace(SlotWeights.adjoining(gate_up_SID, down_SDI), activation=activation)
    if not has_bias:
        return slots
    return replace(slots, gate_up_bias=gate_up_bias_SI.unbind(), down_bias=down_bias_SD.unbind())


def _dimensions(checkpoint: Checkpoint, name: str) -> tuple[int, int, int]:
    shape = checkpoint.shape(name)
    if len(shape) != 3:
        raise ModelError(f"{checkpoint.folder}: tensor {name!r} has shape {list(shape)}, expected three dimensions")
    return shape[0], shape[1], shape[2]


def _read_both(checkpoint: Checkpoint, name: str, expert: int, span: Range, interleaved: bool, out: Tensor) -> None:
    """What is stored as [E, D, 2I] or [E, 2I], of one expert and span: gate above up into out."""
    shape, (first, last) = checkpoint.shape(name), span
    where: dict[str, Any]
    half, axis = shape[-1] // 2, "rows" if len(shape) == 2 else "columns"
    if interleaved:
        where = {axis: (2 * first, 2 * last)}
        pairs = checkpoint.read(name, index=expert, transposed=True, **where)
        torch.cat([pairs[::2], pairs[1::2]], out=out)
        return
    for to, start in zip(out.chunk(2), (0, half), strict=True):
        where = {axis: (start + first, start + last)}
        checkpoint.read(name, index=expert, transposed=True, out=to, **where)
