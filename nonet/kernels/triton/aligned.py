"""Rows laid out as libraries for grouped products want them: each slot's in blocks of their own, gaps between them.

Used by the adapter to DeepGEMM; knows nothing of it. `lay` and `activate` are specified by their plain forms below, and
nothing is read on the host. Legend: see moe/base.py; A places: slot s has its rows at the beginning of as many blocks
of `align` places as they need, slots follow each other without a gap between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.fp8 import FP8, ROW_BLOCK, quantize_rows
from nonet.kernels.triton.fp8 import quantized

ROWS = 32  # places of a program; `align` is a multiple of it


@dataclass(frozen=True, slots=True)
class Aligned:
    """x_AD with what belongs to it. Places that no pair has are undefined, but for slot_A."""

    x_AD: Tensor
    scale_Ad: Tensor | None  # float32, for x_AD in e4m3; a column after the other, [A, d] with strides (1, A)
    slot_A: Tensor  # int32, the same in a whole block; -1 where a block is nobody's
    weight_A: Tensor  # float32
    place_M: Tensor  # int64: where pair m lies; zero past the pairs


def places(num_pairs: int, num_slots: int, align: int) -> int:
    """A: enough for any division of the pairs among the slots."""
    gaps = min(num_pairs, num_slots) * (align - 1)
    return -(-(num_pairs + gaps) // align) * align


def lay(
    x_ND: Tensor, scale_Nd: Tensor | None, row_M: Tensor, weight_M: Tensor, start_S: Tensor, count_S: Tensor, align: int
) -> Aligned:  # fmt: skip
    """Gather the pairs' rows. x_ND in e4m3 comes with its factors; D is a multiple of 128 then."""
    D, S, device, scaled = x_ND.shape[1], len(count_S), x_ND.device, scale_Nd is not None
    A = places(len(row_M), S, align)
    x_AD = torch.empty((A, D), dtype=x_ND.dtype, device=device)
    scale_Ad = torch.empty((D // ROW_BLOCK, A), device=device).t() if scaled else None
    slot_A, weight_A = torch.empty(A, dtype=torch.int32, device=device), torch.empty(A, device=device)
    place_M = torch.zeros(len(row_M), dtype=torch.int64, device=device)
    if A:
        width = ROW_BLOCK if scaled else min(512, triton.next_power_of_2(D))
        _lay[(A // ROWS, triton.cdiv(D, width))](
            x_ND, scale_Nd, row_M, weight_M, start_S, count_S, x_AD, scale_Ad, slot_A, weight_A, place_M, S, D, A,
            SCALED=scaled, ALIGN=align, ROWS=ROWS, BD=width, SLOTS=triton.next_power_of_2(max(1, S)), num_warps=4,
        )  # fmt: skip
    return Aligned(x_AD, scale_Ad, slot_A, weight_A, place_M)


def activate(both_A2I: Tensor, slot_A: Tensor, to_fp8: bool) -> tuple[Tensor, Tensor | None]:
    """(silu(gate) * up [A, I], its factors [A, i] as those of `Aligned`) of gate beside up; in float32, rounded once.

    Blocks that are nobody's stay undefined. I is a multiple of 128 where there are factors.
    """
    A, width = both_A2I.shape[0], both_A2I.shape[1] // 2
    act_AI = torch.empty((A, width), dtype=FP8 if to_fp8 else both_A2I.dtype, device=both_A2I.device)
    scale_Ai = torch.empty((width // ROW_BLOCK, A), device=both_A2I.device).t() if to_fp8 else None
    if A:
        _activate[(A // ROWS, triton.cdiv(width, ROW_BLOCK))](
            both_A2I, slot_A, act_AI, scale_Ai, width, A, TO_FP8=to_fp8, ROWS=ROWS, BI=ROW_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return act_AI, scale_Ai


@triton.jit
def _lay(
    x, x_scale, row, weight, start, count, out, out_scale, slot_out, weight_out, place_out, S, D, A,
    SCALED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS
    s = tl.arange(0, SLOTS)
    count_S = tl.load(count + s, mask=s < S, other=0)
    room_S = (count_S + ALIGN - 1) // ALIGN * ALIGN
    end_S = tl.cumsum(room_S, axis=0)
    slot = tl.sum((end_S <= place).to(tl.int32), axis=0)  # S or more: nobody's
    within = place - tl.sum(tl.where(s < slot, room_S, 0), axis=0)
    left = tl.sum(tl.where(s == slot, count_S, 0), axis=0) - within
    first = tl.load(start + slot, mask=slot < S, other=0) + within
    i, column = tl.arange(0, ROWS), tl.program_id(1)
    own = (i < left) & (slot < S)
    if column == 0:
        tl.store(slot_out + place + i, tl.where(slot < S, slot, -1) + tl.zeros([ROWS], tl.int32))
        tl.store(weight_out + place + i, tl.load(weight + first + i, mask=own, other=0.0), mask=own)
        tl.store(place_out + first + i, place + i, mask=own)
    d = column * BD + tl.arange(0, BD)
    mask = own[:, None] & (d < D)[None, :]
    n = tl.load(row + first + i, mask=own, other=0)
    v = tl.load(x + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    if SCALED:
        scale = tl.load(x_scale + n * (D // BD) + column, mask=own, other=0.0)
        tl.store(out_scale + column.to(tl.int64) * A + place + i, scale, mask=own)
    tl.store(out + (place + i)[:, None] * D + d[None, :], v, mask=mask)


@triton.jit
def _activate(
    both, slot, out, out_scale, width, A, TO_FP8: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS
    if tl.load(slot + place) >= 0:
        a, column = place + tl.arange(0, ROWS), tl.program_id(1)
        i = column * BI + tl.arange(0, BI)
        mask = (i < width)[None, :] & (a < A)[:, None]
        at = both + a[:, None] * (2 * width) + i[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        act = gate / (1.0 + tl.exp(-gate)) * up
        if TO_FP8:
            act, scale = quantized(act)
            tl.store(out_scale + column.to(tl.int64) * A + a, scale)
        tl.store(out + a[:, None] * width + i[None, :], act.to(out.dtype.element_ty), mask=mask)


# -- plain forms, which read the counts on the host -------------------------------------------------------------------


def lay_reference(
    x_ND: Tensor, scale_Nd: Tensor | None, row_M: Tensor, weight_M: Tensor, start_S: Tensor, count_S: Tensor, align: int
) -> Aligned:  # fmt: skip
    """The specification of `lay`; what is undefined is zero."""
    A = places(len(row_M), len(count_S), align)
    x_AD = torch.zeros((A, x_ND.shape[1]), dtype=x_ND.dtype, device=x_ND.device)
    scale_Ad = None if scale_Nd is None else torch.zeros((A, scale_Nd.shape[1]), device=x_ND.device)
    slot_A, weight_A = torch.full((A,), -1, dtype=torch.int32), torch.zeros(A)
    place_M, at = torch.zeros(len(row_M), dtype=torch.int64), 0
    for slot, (start, count) in enumerate(zip(start_S.tolist(), count_S.tolist(), strict=True)):
        row = row_M[start : start + count]
        x_AD.view(torch.uint8)[at : at + count] = x_ND.view(torch.uint8)[row]
        if scale_Ad is not None and scale_Nd is not None:
            scale_Ad[at : at + count] = scale_Nd[row]
        weight_A[at : at + count] = weight_M[start : start + count]
        place_M[start : start + count] = torch.arange(at, at + count)
        room = -(-count // align) * align
        slot_A[at : at + room] = slot
        at += room
    return Aligned(x_AD, scale_Ad, *(part.to(x_ND.device) for part in (slot_A, weight_A, place_M)))


def activate_reference(both_A2I: Tensor, to_fp8: bool) -> tuple[Tensor, Tensor | None]:
    """The specification of `activate`, everywhere."""
    gate, up = both_A2I.float().chunk(2, dim=1)
    act_AI = F.silu(gate) * up
    return quantize_rows(act_AI) if to_fp8 else (act_AI.to(both_A2I.dtype), None)
