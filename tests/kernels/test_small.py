"""Small operations in Triton: their cases in the interpreter and on a GPU, each in a process of its own, and compiled
for GPUs. The interpreter is chosen by an environment variable that is read when kernels are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CASES = Path(__file__).parent / "small_cases.py"


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
    from nonet.kernels.triton import activation, lookup, norm, rope, routing, sampling

    x, i, f, n = "*bf16", "*i64", "*fp32", "i32"
    rows = {"x": x, "weight": x, "out": x, "stride": n, "D": n, "eps": "fp32"}
    yield "norm", norm._norm, rows, {"y": None, "total": None, "BD": 2048}
    yield "add_norm", norm._norm, {**rows, "y": x, "total": x}, {"BD": 2048}
    names = ("qkv", "weight", "cos", "sin", "q", "k_cache", "v_cache")
    sizes = {"k_stride": n, "v_stride": n, "eps": "fp32", "H": n, "h": n, "d": n}
    yield "place_qkv", rope._place_qkv, {**dict.fromkeys(names, x), "place": i, **sizes}, {"BH": 8, "BF": 64}
    names = ("q", "row", "weight", "cos", "sin", "cache")
    sizes = dict.fromkeys(("q_stride", "q_head", "row_stride", "cache_stride", "H", "nope", "c", "r"), n)
    powers = {"BH": 32, "BC": 512, "BF": 32}
    yield "place_latent", rope._place_latent, {**dict.fromkeys(names, x), "place": i, "eps": "fp32", **sizes}, powers
    yield "silu_times", activation._silu_times, {"gate_up": x, "out": x, "width": n}, {"BI": 1024}
    choice = {"logits": x, "expert": i, "weight": f, "E": n, "scale": "fp32"}
    plain = {"K": 8, "G": 1, "e": 128, "KEPT": 1, "BEST": 1, "SIGMOID": False, "RENORMALISE": True}
    powers = {"GROUPS": 1, "EACH": 128, "TOP": 8}
    yield "topk", routing._topk, choice, {"bias": None, **plain, **powers}
    grouped = {"G": 8, "e": 32, "KEPT": 4, "BEST": 2, "SIGMOID": True, "GROUPS": 8, "EACH": 32}
    yield "grouped_topk", routing._topk, {**choice, "logits": f, "bias": f}, {**plain, **powers, **grouped}
    tables = {"expert": i, "slots": i, "replicas": i, "counts": "*i32", "out": i, "P": n, "E": n, "C": n, "first": n}
    yield "look_up", lookup._look_up, tables, {"OWN": 32, "PART": 128, "ROWS": 64, "TURNS": True}
    counted, bins = {"index": i, "P": n, "E": n}, {"CHUNK": 512, "BINS": 128}
    yield "add_counts", lookup._count, {**counted, "into": i}, {**bins, "ADDS": True}
    yield "count", lookup._count, {**counted, "into": "*i32"}, {**bins, "ADDS": False}
    yield "best", sampling._best, {"logits": x, "out": i, "V": n, "each": n}, {"BV": 2048}
    given = {"logits": x, "row": i, "setting": f, "noise": f, "scratch": f, "out": i, "N": n, "V": n}
    yield "draw", sampling._draw, given, {"BV": 8192}
    yield "first", sampling._first, {"best": i, "out": i, "parts": n}, {"PARTS": 64}


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("name", [name for name, *_ in kernels()])
def test_compiles_for(name, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    if "PDL" in kernel.arg_names:
        constants = {**constants, "PDL": True}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs={}),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 4},
    )
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == ("PDL" in kernel.arg_names)
