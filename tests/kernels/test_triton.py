"""Triton kernels: their cases in the interpreter and on a GPU, each in a process of its own, and compiled for GPUs.

The interpreter is chosen by an environment variable that is read when kernels are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CASES = [str(Path(__file__).parent / name) for name in ("triton_cases.py", "fp8_experts_cases.py")]


def run_cases(**env: str) -> str:
    quiet = ["-W", "ignore::DeprecationWarning"]  # of NumPy, by the interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *quiet, *CASES]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_in_the_interpreter():
    assert "[100%]" in run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu():
    said = run_cases(TRITON_INTERPRET="0")
    assert "[100%]" in said
    assert "SKIPPED" not in said


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
    yield "quantize_rows", experts_fp8._quantize_rows, rows, {"BLOCKS": 16, "WIDE": False, "EARLY": True}
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
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs={}),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 8 if name.endswith("128") else 4, "num_stages": 3},
    )
    assert name.startswith(("gate_up", "down")) == (products in compiled.asm["ptx"])
