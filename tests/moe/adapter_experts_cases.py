"""The adapter to DeepGEMM against the reference: with DeepGEMM on a GPU, or with a stand-in for it in Triton's
interpreter on CPU tensors, which computes plainly and asserts what DeepGEMM documents.

Run by test_adapters.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nonet import plugins
from nonet.kernels.fp8 import dequantize_rows, quantize, quantize_rows
from nonet.kernels.triton import INTERPRETED
from nonet.moe.base import Dispatched, group_by_slot_reference, sum_pairs
from nonet.moe.experts import reference
from nonet.weights.slots import BlockScales, SlotWeights

DEVICE = "cpu" if INTERPRETED else "cuda"
S, K, D, WIDTH = 5, 3, 256, 128
BOUND = {"bf16": 1e-2, "fp8": 2e-2}  # of the norm


# -- stand-ins --------------------------------------------------------------------------------------------------------


def grouped_product(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, align: int) -> None:
    """DeepGEMM's contiguous layout: every `align` rows have one weight; those of weight -1 are skipped."""
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert grouped_layout.dtype == torch.int32
    assert len(a) == len(d) == len(grouped_layout)
    assert len(a) % align == 0
    assert a.shape[1] == b.shape[2]
    for at in range(0, len(a), align):
        (weight,) = grouped_layout[at : at + align].unique().tolist()
        if weight >= 0:
            d[at : at + align] = a[at : at + align].float() @ b[weight].float().t()


def pretend_deep_gemm() -> ModuleType:
    module, state = ModuleType("deep_gemm"), {"align": 128}

    def bf16(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor) -> None:
        assert a.dtype == b.dtype == d.dtype == torch.bfloat16
        assert a.shape[1] % 64 == 0
        grouped_product(a, b, d, grouped_layout, state["align"])

    def fp8(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, grouped_layout: Tensor) -> None:
        (x, x_scale), (w, w_scale) = a, b
        assert x.dtype == w.dtype == torch.float8_e4m3fn
        assert x_scale.dtype == w_scale.dtype == torch.float32
        assert x_scale.shape == (len(x), x.shape[1] // 128)
        assert x_scale.stride() == (1, len(x))
        assert w_scale.shape == (len(w), w.shape[1] // 128, w.shape[2] // 128)
        plain = w.float() * w_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        grouped_product(x.float() * x_scale.repeat_interleave(128, 1), plain, d, grouped_layout, state["align"])

    module.m_grouped_bf16_gemm_nt_contiguous, module.m_grouped_fp8_gemm_nt_contiguous = bf16, fp8
    layout = SimpleNamespace(set_mk_alignment_for_contiguous_layout=lambda align: state.update(align=align))
    module.utils = SimpleNamespace(layout=layout)
    return module


@pytest.fixture(autouse=True, scope="module")
def _libraries():
    """On CPUs, stand-ins; on a GPU, what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            module = pretend_deep_gemm()
            module.__spec__ = SimpleNamespace(name="deep_gemm")
            patch.setitem(sys.modules, "deep_gemm", module)
        yield


# -- cases ------------------------------------------------------------------------------------------------------------


def problem(kind: str, rows: int, num_slots: int = S) -> tuple[SlotWeights, Dispatched]:
    """Slots that adjoin, and rows for some of them; what no pair reads is NaN, what is past the pairs is wild."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DEVICE, torch.bfloat16)

    own = SlotWeights.adjoining(draw(num_slots, 2 * WIDTH, D), draw(num_slots, D, WIDTH))
    if kind == "fp8":
        own = in_fp8(own)
    slot_NK = torch.randint(-1, num_slots, (rows, K), generator=generator).to(DEVICE)
    weight_NK = torch.rand((rows, K), generator=generator).to(DEVICE)
    given = group_by_slot_reference(draw(rows, D) * 16, slot_NK, weight_NK, num_slots, None)
    total = int(given.count_S.sum())
    given.x_ND[(slot_NK < 0).all(dim=1)] = torch.nan
    given.weight_M[total:], given.row_M[total:] = torch.nan, 2**40
    return own, given


def in_fp8(own: SlotWeights) -> SlotWeights:
    gates = [[quantize(part, 128) for part in w.chunk(2)] for w in own.gate_up]
    backs = [quantize(w, 128) for w in own.down]
    scales = BlockScales(
        tuple(torch.stack([scale for _, scale in both]) for both in gates), tuple(scale for _, scale in backs), 128
    )
    gate_up = torch.stack([torch.cat([n for n, _ in both]).view(torch.uint8) for both in gates])
    down = torch.stack([n.view(torch.uint8) for n, _ in backs])
    return replace(
        SlotWeights.adjoining(gate_up.view(torch.float8_e4m3fn), down.view(torch.float8_e4m3fn)), scales=scales
    )


def wanted(own: SlotWeights, given: Dispatched, kind: str) -> Tensor:
    """[pairs, D] float32 by the formula; for FP8 with rows and activations rounded to it, as the products take them."""
    if kind == "bf16":
        return reference.create()(given, own, "pairs")[: int(given.count_S.sum())].float()
    out = []
    for slot, (start, count) in enumerate(zip(given.start_S.tolist(), given.count_S.tolist(), strict=True)):
        gate_up, down = own.matrices(slot, torch.float32)
        x_CD = dequantize_rows(*quantize_rows(given.rows()[given.row_M[start : start + count]]), torch.float32)
        gate, up = (x_CD @ gate_up.t()).chunk(2, dim=1)
        act_CI = dequantize_rows(*quantize_rows(F.silu(gate) * up), torch.float32) if count else gate
        out.append(act_CI @ down.t())
    return torch.cat(out)


KINDS = ["bf16", "fp8"]
ROWS = [0, 1, 9, 40] if INTERPRETED else [0, 1, 9, 40, 300]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent_in_fp8", [False, True])
def test_against_the_reference(kind: str, rows: int, sent_in_fp8: bool):
    own, given = problem(kind, rows)
    if sent_in_fp8:
        x_ND, scale_Nd = quantize_rows(given.x_ND)
        given = replace(given, x_ND=x_ND, scale_Nd=scale_Nd)
    kernel = plugins.load("nonet.moe.experts", "deepgemm", "expert_backend").create()
    kernel.check(own)
    total, want = int(given.count_S.sum()), wanted(own, given, kind)
    y_MD, y_ND = kernel(given, own, "pairs"), kernel(given, own, "rows")
    assert y_MD.dtype == y_ND.dtype == torch.bfloat16
    assert y_ND.shape == (rows, D)
    assert (y_MD[:total].float() - want).norm() <= BOUND[kind] * want.norm()
    want_ND = sum_pairs(want, given)
    assert (y_ND.float() - want_ND).norm() <= BOUND[kind] * want_ND.norm()
    assert not y_ND[(given.pair_NK < 0).all(dim=1)].any()


def test_a_rank_without_slots():
    x_ND, slot_NK = torch.ones((4, D), device=DEVICE), torch.full((4, 2), -1, device=DEVICE)
    given = group_by_slot_reference(x_ND, slot_NK, torch.ones((4, 2), device=DEVICE), 0, None)
    kernel = plugins.load("nonet.moe.experts", "deepgemm", "expert_backend").create()
    kernel.check(SlotWeights((), ()))
    assert kernel(given, SlotWeights((), ()), "rows").tolist() == torch.zeros((4, D)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
def test_in_a_graph(kind: str):
    """Captured with one load, replayed with another."""
    (own, given), (_, other) = problem(kind, 40), problem(kind, 40, 2)
    kernel = plugins.load("nonet.moe.experts", "deepgemm", "expert_backend").create()
    other = replace(other, **{n: F.pad(getattr(other, n), (0, S - 2)) for n in ("start_S", "count_S")})
    want = kernel(other, own, "rows").clone()
    kernel(given, own, "rows")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_ND = kernel(given, own, "rows")
    for part in ("x_ND", "row_M", "weight_M", "pair_NK", "start_S", "count_S"):
        getattr(given, part).copy_(getattr(other, part))
    graph.replay()
    assert torch.equal(y_ND.nan_to_num(), want.nan_to_num())
