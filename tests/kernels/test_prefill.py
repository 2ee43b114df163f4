"""The kernel of prompts' attention: its cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import compile_for, run_cases

CASES = Path(__file__).parent / "prefill_cases.py"


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases(CASES, interpreted=False)


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
    from nonet.kernels.triton import prefill

    kernel = prefill._prefill
    constants = {"BM": 64, "BN": 64, "PROMPTS": 16, "WIDE": False, **SIGHTS[sight], **KINDS[kind]}
    types = dict.fromkeys(("q", "k", "more", "v", "out"), "*bf16") | {"sink": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("block", "first", "count", "context"), "*i64")
    boxes = ("k", "more", "v") if constants["BOXES"] else ()
    types |= dict.fromkeys(boxes, "tensordesc<bf16[64, 128]>")
    types = dict.fromkeys(kernel.arg_names, "i32") | types
    odd = ("scale", "P", "h", "block_row", *boxes, *constants)
    aligned = [name for name in kernel.arg_names if name not in odd]
    ptx = compile_for(architecture, kernel, types, constants, aligned=aligned, num_warps=4, num_stages=2)
    assert products in ptx
    assert ("cp.async.bulk.tensor" if boxes else "cp.async.cg") in ptx, "loads that do not pass through registers"
