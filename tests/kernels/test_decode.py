"""Decode attention's kernels: their cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CASES = Path(__file__).parent / "decode_cases.py"


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
    """(name, kernel, types of its arguments, constants, options, its products' instructions by architecture)."""
    from nonet.kernels.triton import decode, latent_hopper

    x, i, f = "*bf16", "*i64", "*fp32"
    names = ["block_stride", "q_stride", "q_head", "key_stride", "value_stride", "out_stride", "out_head"]
    sizes = dict.fromkeys(["B", "window", "chunk", "programs", *names], "i32")
    data = {
        "q": x,
        "keys": x,
        "values": x,
        "block": i,
        "length": i,
        "out": x,
        "part": f,
        "top": f,
        "cut": "*i32",
        "sink": f,
    }
    types = {**data, **sizes, "part": f, "top": f, "sink": f, "scale": "fp32"}
    grouped = {"h": 4, "G": 8, "DIM": 128, "REST": 0, "SHARED": False, "HEADS": 16, "PACKS": 1, "BN": 64}
    latent = {"h": 1, "G": 128, "DIM": 512, "REST": 64, "SHARED": True, "HEADS": 64, "PACKS": 2, "BN": 32}
    both = {"SIZE": 16, "SLOTS": 64, "WIDE": False}
    few, many = {90: "mma.sync", 100: "mma.sync"}, {90: "wgmma", 100: "tcgen05"}
    options = {"num_warps": 4, "num_stages": 3}, {"num_warps": 8, "num_stages": 2}
    yield "grouped", decode._spans, types, {**grouped, **both, "HAS_SINK": True}, options[0], few
    yield "latent", decode._spans, types, {**latent, **both, "HAS_SINK": False}, options[1], many
    join = {"h": 4, "G": 8, "DIM": 128, "HAS_SINK": True, "PARTS": 16, "ROWS": 16}
    yield "join", decode._join, types, join, options[0], {90: "ex2", 100: "ex2"}
    hopper = {"G": 128, "DIM": 512, "REST": 64, "SIZE": 16, "SLOTS": 64, "PACKS": 2}
    yield "hopper", latent_hopper.spans, {**types, "rows": x}, hopper, {"num_warps": 4}, {90: "wgmma"}


@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, *_, instructions in kernels() for a in instructions])
def test_compiles_for(name, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants, options, instructions = next(case for case in kernels() if case[0] == name)
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    names = kernel.arg_names
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    even = [n for n, a in enumerate(names) if signature[a].startswith("*") or a.startswith(("q_", "key_", "value_"))]
    attributes = {(n,): [["tt.divisibility", 16]] for n in even}
    compiled = triton.compile(
        source(kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    assert instructions[architecture] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232448  # bytes a program may have
