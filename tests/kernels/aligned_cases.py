"""Rows in aligned blocks against their plain form: on a GPU, or on CPU tensors in Triton's interpreter.

Run by test_aligned.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

import pytest
import torch

from nonet.kernels.fp8 import quantize_rows
from nonet.kernels.triton import INTERPRETED, aligned

DEVICE = "cpu" if INTERPRETED else "cuda"
COUNTS = {
    "some": [3, 0, 33, 1, 32],
    "one slot": [70],
    "nobody": [0, 0, 0],
    "no slots": [],
    "many": [7, 1] * 20,
}
CASES = [(label, align) for label in COUNTS for align in (32, 64)] + [("some", 128)]


def given(label: str, spare: int = 9):
    """Pairs of every slot, in order, and some past them that are wild."""
    counts, generator = COUNTS[label], torch.Generator().manual_seed(1)
    count_S = torch.tensor(counts, dtype=torch.int64)
    total, N = sum(counts), 11
    row_M = torch.cat([torch.randint(0, N, (total,), generator=generator), torch.full((spare,), 2**40)])
    weight_M = torch.cat([torch.rand(total, generator=generator), torch.full((spare,), torch.nan)])
    return total, [t.to(DEVICE) for t in (row_M, weight_M, count_S.cumsum(0) - count_S, count_S)]


@pytest.fixture(autouse=True)
def _undefined_memory_is_nan(monkeypatch):
    real = torch.empty

    def filled(*args, **kwargs):
        out = real(*args, **kwargs)
        out.view(torch.uint8).fill_(255)
        return out

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize(("label", "align"), CASES)
@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_lay(label, align, kind):
    total, pairs = given(label)
    D = 256 if kind == "fp8" else 40
    x_ND = torch.randn((11, D), generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    x, scale = quantize_rows(x_ND) if kind == "fp8" else (x_ND, None)
    got = aligned.lay(x, scale, *pairs, align)
    want = aligned.lay_reference(x, scale, *pairs, align)
    assert torch.equal(got.slot_A, want.slot_A)
    assert torch.equal(got.place_M, want.place_M)
    live = got.place_M[:total]
    assert len(live.unique()) == total
    assert torch.equal(got.weight_A[live], want.weight_A[live])
    assert torch.equal(got.x_AD[live].view(torch.uint8), want.x_AD[live].view(torch.uint8))
    if kind != "plain":
        assert got.scale_Ad.stride() == (1, len(got.slot_A))
        assert torch.equal(got.scale_Ad[live], want.scale_Ad[live])


@pytest.mark.parametrize("to_fp8", [False, True])
@pytest.mark.parametrize("label", ["some", "nobody"])
def test_activate(label, to_fp8):
    width, (total, pairs) = 256 if to_fp8 else 72, given(label)
    laid = aligned.lay_reference(torch.zeros((11, 8), device=DEVICE), None, *pairs, 64)
    both = torch.randn((len(laid.slot_A), 2 * width), generator=torch.Generator().manual_seed(3))
    both = both.to(DEVICE, torch.bfloat16)
    (got, got_scale), (want, want_scale) = (
        aligned.activate(both, laid.slot_A, to_fp8),
        aligned.activate_reference(both, to_fp8),
    )
    own = laid.slot_A >= 0
    if to_fp8:
        torch.testing.assert_close(got_scale[own], want_scale[own], rtol=1e-5, atol=0)
    # one number in a hundred thousand may be rounded the other way
    off = (got[own].float() - want[own].float()).abs() > 1e-2 * want[own].float().abs()
    assert off.sum() <= max(1, off.numel() // 100_000)
    assert own.any() == bool(total)
