"""Decode attention's kernels: their cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import compile_for, run_cases

CASES = Path(__file__).parent / "decode_cases.py"


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases(CASES, interpreted=False)


def kernels():
    """(name, kernel, types of its arguments, constants, options, its products' instructions by architecture)."""
    from nonet.kernels.triton import decode, latent_hopper

    x, i, f = "*bf16", "*i64", "*fp32"
    names = ["block_stride", "q_stride", "q_head", "key_stride", "value_stride", "out_stride", "out_head"]
    sizes = dict.fromkeys(["B", "window", "chunk", "programs", *names], "i32")
    data = dict.fromkeys(("q", "keys", "values", "out"), x) | {"block": i, "length": i, "cut": "*i32"}
    types = {**data, **sizes, "part": f, "top": f, "sink": f, "scale": "fp32"}
    grouped = {"h": 4, "G": 8, "DIM": 128, "REST": 0, "SHARED": False, "HEADS": 16, "PACKS": 1, "BN": 64}
    latent = {"h": 1, "G": 128, "DIM": 512, "REST": 64, "SHARED": True, "HEADS": 64, "PACKS": 2, "BN": 32}
    both = {"SIZE": 16, "SLOTS": 64, "WIDE": False}
    few, many = {90: "mma.sync", 100: "mma.sync"}, {90: "wgmma", 100: "tcgen05"}
    options = {"num_warps": 4, "num_stages": 3}, {"num_warps": 8, "num_stages": 2}
    yield "grouped", decode._spans, types, {**grouped, **both, "HAS_SINK": True}, options[0], few
    yield "latent", decode._spans, types, {**latent, **both, "HAS_SINK": False}, options[1], many
    join = {"h": 4, "G": 8, "DIM": 128, "HAS_SINK": True, "PARTS": 4, "HEADS": 4, "ROWS": 16, "EARLY": True}
    yield "join", decode._join, types, join, options[0], {90: "ex2", 100: "ex2"}

    def boxes(rows, columns):
        return f"tensordesc<bf16[{rows}, {columns}],{latent_hopper.SHARED.value!r}>"

    for size in (16, 32, 64):
        tables = {"queries": boxes(64, 256), "query_rests": boxes(64, 64)}
        tables |= {"rows": boxes(size, 256), "rests": boxes(size, 64), "heads": "i32"}
        hopper = {"G": 128, "SIZE": size, "SLOTS": 64, "PACKS": 2}
        yield f"hopper_{size}", latent_hopper.spans, {**types, **tables}, hopper, {"num_warps": 4}, {90: "wgmma"}


@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, *_, instructions in kernels() for a in instructions])
def test_compiles_for(name, architecture):
    _, kernel, types, constants, options, instructions = next(case for case in kernels() if case[0] == name)
    named = [n for n in kernel.arg_names if n in types and n not in constants]
    aligned = [n for n in named if types[n].startswith("*") or n.startswith(("q_", "key_", "value_"))]
    assert instructions[architecture] in compile_for(architecture, kernel, types, constants, aligned=aligned, **options)
