"""Triton kernels of experts: their cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import compile_for, run_cases

CASES = [Path(__file__).parent / name for name in ("triton_cases.py", "fp8_experts_cases.py")]


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_in_the_interpreter(cases):
    run_cases(cases, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_on_a_gpu(cases):
    run_cases(cases, interpreted=False)


def kernels():
    """(name, kernel, types of its arguments, constants)."""
    from nonet.kernels.triton import experts, experts_fp8, grouping

    x, i, f, e = "*bf16", "*i64", "*fp32", "*fp8e4nv"
    how = {"D": 2048, "width": 768, "SLOTS": 128, "WIDE": False, "EARLY": True}
    ids = {"start": i, "count": i, "address": i, "S": "i32"}
    for swap, BM, BN in ((True, 16, 128), (False, 128, 128)):
        how |= {"LOOP": not swap, "HALVE": not swap}
        tile = {**how, "BM": BM, "BN": BN, "BK": 64, "SWAP": swap, "bias": None}
        yield f"gate_up-{BM}", experts._gate_up, {"x": x, "row": i, "out": x, **ids}, {**tile, "CLAMPED": False}
        yield f"down-{BM}", experts._down, {"act": x, "out": x, **ids}, tile
        ids_fp8 = {"scale_address": i, **ids}
        tile = {**how, "BM": BM, "BK": 128, "SWAP": swap}
        ins, outs = {"x": e, "x_scale": f, "row": i}, {"out": e, "out_scale": f}
        yield f"gate_up_fp8-{BM}", experts_fp8._gate_up, {**ins, **outs, **ids_fp8}, tile
        yield f"down_fp8-{BM}", experts_fp8._down, {"act": e, "act_scale": f, "out": x, **ids_fp8}, {**tile, "BN": BN}
    rows = {"x": x, "out": e, "scale": f, "D": "i32"}
    yield "quantize_rows", experts_fp8._quantize_rows, rows, {"BLOCKS": 16, "EARLY": True}
    sums = {"y": x, "pair": i, "weight": f, "out": x, "D": "i32"}
    yield "sum_pairs", experts._sum_pairs, sums, {"K": 8, "BD": 1024, "EARLY": True}
    chunk, pairs = {"CHUNK": 128, "SLOTS": 128, "EARLY": True}, {"P": "i32", "S": "i32"}
    yield "count", grouping._count, {"slot": i, "number": "*i32", **pairs}, chunk
    add_up = {"number": "*i32", "count_out": i, "chunks": "i32", "S": "i32"}
    yield "add_up", grouping._add_up, add_up, {"EARLY": True}
    outs = {"slot": i, "weight": f, "row_out": i, "weight_out": f, "pair_out": i, "start_out": i, "count_out": i}
    outs |= {"K": "i32", **pairs}
    for added in (False, True):
        place = {**chunk, "MOST": 1 if added else 32, "ADDED": added}
        yield f"place-{added}", grouping._place, {**outs, "number": "*i32", "chunks": "i32"}, place
    yield "place_all", grouping._place_all, outs, chunk


@pytest.mark.parametrize(("architecture", "products"), [(90, "wgmma"), (100, "tcgen05")])
@pytest.mark.parametrize("name", [name for name, *_ in kernels()])
def test_compiles_for(name, architecture, products):
    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    options = {"num_warps": 8 if name.endswith("128") else 4, "num_stages": 3}
    ptx = compile_for(architecture, kernel, types, constants, **options)
    assert name.startswith(("gate_up", "down")) == (products in ptx)
