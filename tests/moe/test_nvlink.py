"""The all-to-alls over NVLink: in the interpreter, compiled for GPUs, refused on CPUs, a hundred thousand passes.

Their contract on GPUs is in test_all2all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nonet import plugins
from nonet.config.fleet import Fleet
from nonet.errors import ConfigError
from nonet.moe.base import All2AllSpec
from nonet.testing.cluster import Cluster
from tests.in_triton import compile_for, run_cases

CASES = Path(__file__).parent / "nvlink_cases.py"
NAMES = [name for name in plugins.names("nonet.moe.all2all") if name.startswith("nvlink_")]


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.parametrize("name", NAMES)
def test_refused_on_cpus(name: str, cluster2):
    said = cluster2.run(refusal, name)
    assert all("use shm" in text for text in said)


def refusal(world, name: str) -> str:
    spec = All2AllSpec(world.ep, Fleet.even(2, 4), 2, 32, torch.float32, 4, False)
    with pytest.raises(ConfigError) as caught:
        plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec)
    return str(caught.value)


def kernels():
    """(name, kernel, types of its arguments, constants)."""
    from nonet.kernels.triton import exchange

    x, i, f = "*bf16", "*i64", "*fp32"
    numbers = dict.fromkeys(("T", "D", "K", "R", "me"), "i32")
    waiting = {"epoch": i, "late": i, "told": i, "clock": i, "limit": "i64"}
    places = dict.fromkeys(("first", "x_at", "scale_at", "slot_at", "weight_at", "flag_at", "y_at", "pair_at"), "i64")
    common = {"x": x, "out": x, "slot": i, "weight": f, "window_G": i, "window_R": i, "first_R": "*i32"}
    common |= {"ready": i, "flags": i, "ready_at": "i64", **numbers, **waiting, **places}
    shape = {"KP": 8, "RP": 4, "TOP": 8, "BD": 2048, "PARTS": 1}
    for fp8 in (False, True):
        yield f"push-{'fp8' if fp8 else 'bf16'}", exchange.push, common, {**shape, "FP8": fp8}
    yield "wait", exchange.wait, common, {"RP": 4}
    for each in (False, True):
        yield f"pull-{'exact' if each else 'fast'}", exchange.pull, common, {**shape, "EACH": each}


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("name", [name for name, *_ in kernels()])
def test_compiles_for(name: str, architecture: int):
    _, kernel, types, constants = next(case for case in kernels() if case[0] == name)
    ptx = compile_for(architecture, kernel, types, constants, num_warps=8)
    raises = {"push": "sys.release.add", "pull": "sys.release.exch", "wait": ""}[name.split("-")[0]]
    assert raises in ptx
    assert name.startswith("push") or "sys.acquire" in ptx  # flags are awaited


@pytest.mark.gpus(2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_passes(name: str, pools):
    """Random routing, ranks out of step, often without a token, graphs replayed, NaN wherever nothing is defined."""
    passes = 100_000 // len(NAMES)
    for report in pools.get(2, "cuda").run("tests.moe.nvlink_soak:soak", name, passes, timeout_s=280):
        assert report == {"passes": passes, "wrong": 0}


@pytest.mark.gpus(2)
def test_the_soak_would_notice(pools):
    for report in pools.get(2, "cuda").run("tests.moe.nvlink_soak:soak", NAMES[0], 400, True, timeout_s=200):
        assert report["wrong"] >= 200


@pytest.mark.gpus(2)
def test_a_wait_ends_and_names_who_is_late():
    with Cluster(2, device="cuda", timeout_s=60, comm_timeout_s=3) as cluster:
        (text, took), _ = cluster.run("tests.moe.nvlink_soak:one_stays_away", NAMES[0])
    assert text.endswith("all-to-all: rank(s) 1 did not arrive within 3 s")
    assert took < 1, "once it gave up it does not wait again"


@pytest.mark.gpus(2)
def test_who_comes_too_late_learns_of_it():
    with Cluster(2, device="cuda", timeout_s=60, comm_timeout_s=3) as cluster:
        said = cluster.run("tests.moe.nvlink_soak:one_stays_away", NAMES[0], 8.0)
    assert ["rank(s) 1 did" in said[0][0], "rank(s) 0 did" in said[1][0]] == [True, True]
