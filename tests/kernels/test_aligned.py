"""Rows in aligned blocks: their cases in the interpreter and on a GPU, and compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import compile_for, run_cases

CASES = Path(__file__).parent / "aligned_cases.py"


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases(CASES, interpreted=False)


def kernels():
    """(name, kernel, types of its arguments, constants)."""
    from nonet.kernels.triton import aligned

    x, i, f, n, e = "*bf16", "*i64", "*fp32", "*i32", "*fp8e4nv"
    how = {"ROWS": 32}
    types = {"row": i, "weight": f, "start": i, "count": i, "slot_out": n, "weight_out": f, "place_out": i}
    types |= {"S": "i32", "D": "i32", "A": "i32"}
    lay = {"ROWS": 32, "ALIGN": 64, "SLOTS": 128}
    plain = {"SCALED": False, "x_scale": None, "out_scale": None, "BD": 512}
    yield "lay", aligned._lay, {"x": x, "out": x, **types}, {**lay, **plain}
    scaled = {"x": e, "x_scale": f, "out": e, "out_scale": f, **types}
    yield "lay_fp8", aligned._lay, scaled, {**lay, "SCALED": True, "BD": 128}
    types = {"both": x, "slot": n, "width": "i32", "A": "i32"}
    yield "activate", aligned._activate, {**types, "out": x}, {**how, "TO_FP8": False, "BI": 128, "out_scale": None}
    yield "activate_to_fp8", aligned._activate, {**types, "out": e, "out_scale": f}, {**how, "TO_FP8": True, "BI": 128}


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("name", [name for name, *_ in kernels()])
def test_compiles_for(name, architecture):
    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    ptx = compile_for(architecture, kernel, types, constants, num_warps=4)
    assert ("e4m3x2" in ptx) == name.endswith("to_fp8")  # the numbers are made by the GPU's conversion
