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
CASES = Path(__file__).parent / "triton_cases.py"


def run_cases(**env: str) -> str:
    quiet = ["-W", "ignore::DeprecationWarning"]  # of NumPy, by the interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *quiet, str(CASES)]
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
    from nonet.kernels.triton import experts, grouping

    x, i, f = "*bf16", "*i64", "*fp32"
    sizes = {"S": "i32", "D": "i32", "width": "i32"}
    for swap, BM, BN in ((True, 16, 128), (False, 128, 128)):
        tile = {"BM": BM, "BN": BN, "BK": 64, "SLOTS": 128, "SWAP": swap, "WHOLE": True, "WIDE": False}
        ids = {"start": i, "count": i, "address": i, "out": x}
        yield f"gate_up-{BM}", experts._gate_up, {"x": x, "row": i, **ids, **sizes}, tile
        yield f"down-{BM}", experts._down, {"act": x, **ids, **sizes}, tile
    sums = {"y": x, "pair": i, "weight": f, "out": x, "D": "i32"}
    yield "sum_pairs", experts._sum_pairs, sums, {"K": 8, "BD": 1024}
    chunk, pairs = {"CHUNK": 128, "PART": 64, "SLOTS": 128}, {"P": "i32", "K": "i32", "S": "i32"}
    yield "count", grouping._count, {"slot": i, "counts": "*i32", **pairs}, chunk
    outs = {"slot": i, "weight": f, "row_out": i, "weight_out": f, "pair_out": i, "start_out": i, "count_out": i}
    yield "place", grouping._place, {**outs, "counts": "*i32", "chunks": "i32", **pairs}, {**chunk, "ROWS": 32}
    yield "place_all", grouping._place_all, {**outs, **pairs}, chunk


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
    assert ("dot" in name or name.startswith(("gate_up", "down"))) == (products in compiled.asm["ptx"])
