"""Small operations in Triton: their cases in the interpreter and on a GPU, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import compile_for, run_cases

CASES = Path(__file__).parent / "small_cases.py"


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases(CASES, interpreted=False)


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
    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    ptx = compile_for(architecture, kernel, types, {"EARLY": True, **constants}, num_warps=4)
    assert ("griddepcontrol.wait" in ptx) == ("EARLY" in kernel.arg_names)
