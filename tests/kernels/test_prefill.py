"""The kernel of prompts' attention: its cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CASES = Path(__file__).parent / "prefill_cases.py"


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


SIGHTS = {
    "causal": {"WINDOW": 0, "CHUNK": 0, "HAS_SINK": False},
    "window-sinks": {"WINDOW": 128, "CHUNK": 0, "HAS_SINK": True},
}
KINDS = {
    "blocks": {"A": 128, "B": 0, "V": 128, "G": 8, "BLOCK": 16, "BOXES": False},
    "boxes": {"A": 128, "B": 0, "V": 128, "G": 8, "BLOCK": 64, "BOXES": True},
    "latent": {"A": 128, "B": 64, "V": 128, "G": 1, "BLOCK": 0, "BOXES": False},
}


@pytest.mark.parametrize(("architecture", "products"), [(90, "wgmma"), (100, "tcgen05")])
@pytest.mark.parametrize(("sight", "kind"), [("window-sinks", "blocks"), ("causal", "boxes"), ("causal", "latent")])
def test_compiles_for(sight, kind, architecture, products):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nonet.kernels.triton import prefill

    kernel = prefill._prefill
    constants = {"BM": 64, "BN": 64, "PROMPTS": 16, "WIDE": False, **SIGHTS[sight], **KINDS[kind]}
    types = dict.fromkeys(("q", "k", "more", "v", "out"), "*bf16") | {"sink": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("block", "first", "count", "context"), "*i64")
    boxes = ("k", "more", "v") if constants["BOXES"] else ()
    types |= dict.fromkeys(boxes, "tensordesc<bf16[64, 128]>")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    odd = ("scale", "P", "h", "block_row", *boxes, *constants)
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in odd}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=even),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 4, "num_stages": 2},
    )
    ptx = compiled.asm["ptx"]
    assert products in ptx
    assert ("cp.async.bulk.tensor" if boxes else "cp.async.cg") in ptx, "loads that do not pass through registers"
