"""Adapters to other people's libraries: on CPU ranks with stand-ins for them, on GPUs with what is installed there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from nonet import plugins
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.errors import ConfigError
from nonet.kernels.fp8 import FP8, quantize_rows
from nonet.moe.all2all import _deepep, _library
from nonet.moe.base import All2AllSpec, Dispatched
from nonet.moe.experts import deepgemm
from nonet.testing import contracts
from nonet.testing.cluster import Cluster
from nonet.testing.contracts import Case, Report, cases, check_all2all, soak
from nonet.testing.routing import Tokens
from nonet.weights.slots import BlockScales, SlotWeights

PACKAGE = "nonet.moe.all2all"
DEEPEP, FLASHINFER = ("deepep_high_throughput", "deepep_low_latency"), "flashinfer_all2allv"
ALL = (*DEEPEP, FLASHINFER)
LIBRARY = {DEEPEP[0]: "deep_ep", DEEPEP[1]: "deep_ep", FLASHINFER: "flashinfer"}
WIDE = Case(((7, 0, 3, 1),), hidden_size=256, dtype="bfloat16", top_k=3, fp8=True)
IN_FP8 = {"fp8": WIDE, "fp8 dropped": replace(WIDE, routing="dropped"), "fp8 none": replace(WIDE, rows=((0,) * 4,))}


def plain_slots(width: int = 128, dtype: torch.dtype = torch.bfloat16) -> SlotWeights:
    return SlotWeights.adjoining(torch.zeros((2, 2 * width, 128)).to(dtype), torch.zeros((2, 128, width)).to(dtype))


def deepep_cases(size: int) -> dict[str, Case]:
    """As every backend's, in bfloat16 at a width that DeepEP moves; it does nothing else."""
    out = {label: case for label, case in cases(DEEPEP[0], size).items() if not case.exact and case.dtype != "float16"}
    return {label: replace(case, dtype="bfloat16", hidden_size=128) for label, case in out.items()} | IN_FP8


ON_CPU = [(name, label, case) for name in DEEPEP for label, case in deepep_cases(4).items()]
ON_CPU += [(FLASHINFER, label, case) for label, case in (cases(FLASHINFER, 4) | IN_FP8).items()]


def pretended(world: World, name: str, case: Case) -> Report:
    """The contract on a CPU rank, with a stand-in for the library."""
    from tests.moe import pretend_deep_ep, pretend_flashinfer

    modules = {"deep_ep": pretend_deep_ep, "flashinfer": pretend_flashinfer, "flashinfer.comm": pretend_flashinfer}
    modules |= {"flashinfer.comm.mnnvl": pretend_flashinfer}
    pretend_flashinfer.comm = pretend_flashinfer
    with pytest.MonkeyPatch.context() as patch:
        for module, stand_in in modules.items():
            patch.setitem(sys.modules, module, stand_in)
        for adapter in (_deepep, plugins.load(PACKAGE, FLASHINFER, "all2all_backend")):
            patch.setattr(adapter, "needs_cuda", lambda name, spec: None)
        if name == "deepep_low_latency":  # in place of the contract's checks that a token comes once
            patch.setattr(contracts._Layer, "_check_received", a_row_for_each_pair)
            patch.setattr(contracts._Layer, "_check_fp8", the_numbers_of_fp8)
        return check_all2all(world, name, case)


def a_row_for_each_pair(layer: contracts._Layer, sent: Dispatched, slots: list[Tensor]) -> None:
    """DeepEP sends a token to each slot by itself."""
    first = layer.spec.first_slot
    slot_NK = torch.cat(slots)
    here = slot_NK[(slot_NK >= first) & (slot_NK < first + layer.spec.num_slots)]
    assert sent.count_S.tolist() == torch.bincount(here - first, minlength=layer.spec.num_slots).tolist()
    assert sent.start_S.tolist() == (sent.count_S.cumsum(0) - sent.count_S).tolist()
    assert len(sent.row_M[: len(here)].unique()) == len(here)
    if len(here):
        assert sent.pair_NK[sent.row_M[: len(here)], 0].tolist() == list(range(len(here)))


def the_numbers_of_fp8(layer: contracts._Layer, sent: Dispatched, inputs: list[Tokens], slots: list[Tensor]) -> None:
    """Each row is one of those that were sent to this rank, rounded as specified."""
    first, slot_NK = layer.spec.first_slot, torch.cat(slots)
    here_N = ((slot_NK >= first) & (slot_NK < first + layer.spec.num_slots)).any(dim=1)
    want_ND, want_scale_Nd = quantize_rows(torch.cat([given.x_TD for given in inputs])[here_N])
    read = sent.row_M[: int(sent.count_S.sum())]

    def rows(x_ND: Tensor, scale_Nd: Tensor) -> set[bytes]:
        return {x.numpy().tobytes() for x in torch.cat([x_ND.view(torch.uint8), scale_Nd.view(torch.uint8)], dim=1)}

    assert rows(sent.x_ND[read], sent.scale_Nd[read]) == rows(want_ND, want_scale_Nd)


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}-{label}") for n, label, c in ON_CPU])
def test_contract_with_a_stand_in(cluster4: Cluster, name: str, case: Case):
    reports = cluster4.run(pretended, name, case)
    assert len({report.calls for report in reports}) == 1, reports


@pytest.mark.parametrize("name", ALL)
def test_many_passes_with_a_stand_in(cluster4: Cluster, name: str):
    case = soak(name, 4, 60)
    if name in DEEPEP:
        case = replace(case, dtype="bfloat16", hidden_size=128)
    cluster4.run(pretended, name, case)


# -- experts ------------------------------------------------------------------------------------------------------


def run_expert_cases(**env: str) -> str:
    quiet = ["-W", "ignore::DeprecationWarning", "-W", "ignore::RuntimeWarning"]  # of NumPy; and of undefined rows
    cases = Path(__file__).parent / "adapter_experts_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *quiet, str(cases)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_experts_with_a_stand_in():
    pytest.importorskip("triton")
    assert "[100%]" in run_expert_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_experts_with_deepgemm():
    pytest.importorskip("deep_gemm")
    said = run_expert_cases(TRITON_INTERPRET="0")
    assert "[100%]" in said
    assert "SKIPPED" not in said


BIASED = replace(plain_slots(), gate_up_bias=(torch.zeros(256),) * 2, down_bias=(torch.zeros(128),) * 2)
APART = replace(plain_slots(), stacked=None)
EXPERTS_REFUSED = [
    (BIASED, "has no biases or other activations"),
    (replace(plain_slots(), activation="clamped"), "has no biases or other activations"),
    (APART, "needs slots that adjoin"),
    (plain_slots(dtype=torch.float16), "computes in bfloat16 or FP8, not float16"),
    (plain_slots(width=96), "needs widths that 64 divides, not 128 and 96"),
    (replace(plain_slots(dtype=FP8), scales=BlockScales((), (), 64)), "takes FP8 in whole blocks of 128"),
    (replace(plain_slots(dtype=FP8), scales=BlockScales((), (), 128, 5)),
     "takes FP8 in whole blocks of 128"),
    (replace(plain_slots(192, dtype=FP8), scales=BlockScales((), (), 128)),
     "needs widths that 128 divides, not 128 and 192"),
]  # fmt: skip


@pytest.mark.parametrize(("slots", "why"), EXPERTS_REFUSED)
def test_slots_that_are_refused(slots: SlotWeights, why: str):
    kernel = deepgemm.create()
    with pytest.raises(ConfigError) as error:
        kernel.check(slots)
    assert str(error.value) == f"expert_backend = 'deepgemm': {why}; use triton"


def test_an_expert_library_that_is_not_installed():
    with mock.patch.object(deepgemm, "find_spec", return_value=None), pytest.raises(ConfigError) as error:
        plugins.load("nonet.moe.experts", "deepgemm", "expert_backend")
    why = "not available here: the module deep_gemm is not installed; pip install 'nonet[deepgemm]'"
    assert str(error.value) == f"expert_backend = 'deepgemm': {why}"


# -- what is refused ----------------------------------------------------------------------------------------------


def spec(device: str = "cuda", **other) -> All2AllSpec:
    group = mock.Mock(rank=0, size=2, device=torch.device(device))
    given = dict(group=group, fleet=Fleet.even(2, 8), top_k=2, hidden_size=256, dtype=torch.bfloat16, max_rows=8)
    return All2AllSpec(**(given | dict(exact=False) | other))


REFUSED = [
    *[(name, spec("cpu"), f"all2all_backend = '{name}': moves GPU tensors; on CPUs use shm") for name in ALL],
    *[(name, spec(exact=True), f"combine = 'exact': {name} adds up on the way; use another all2all_backend")
      for name in DEEPEP],
    *[(name, spec(dtype=torch.float32), f"all2all_backend = '{name}': moves bfloat16, not float32") for name in DEEPEP],
    *[(name, spec(hidden_size=200), f"all2all_backend = '{name}': needs a width that 128 divides, not 200")
      for name in DEEPEP],
    (FLASHINFER, spec(top_k=23), f"all2all_backend = '{FLASHINFER}': sends to at most 22 slots a token, not 23"),
    (FLASHINFER, spec(dtype=torch.float32, fp8=True),
     "fp8_dispatch = True: rows travel in FP8 only in bfloat16 models of a width that 128 divides"),
    (FLASHINFER, spec(group=mock.Mock(rank=0, size=65, device=torch.device("cuda"))),
     f"all2all_backend = '{FLASHINFER}': connects at most 64 ranks, not 65"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "line"), REFUSED)
def test_refusals(name: str, given: All2AllSpec, line: str):
    with mock.patch.object(_library, "find_spec"), pytest.raises(ConfigError) as error:
        plugins.load(PACKAGE, name, "all2all_backend").create(given)
    assert str(error.value) == line


def test_numbers_of_ranks_that_deepep_does_not_know(monkeypatch):
    from tests.moe import pretend_deep_ep

    monkeypatch.setitem(sys.modules, "deep_ep", pretend_deep_ep)
    three = spec(group=mock.Mock(rank=0, size=3, device=torch.device("cuda")), fleet=Fleet.even(3, 9))
    monkeypatch.setattr("nonet.moe.all2all.deepep_high_throughput.EvenIds", mock.Mock())  # there is no GPU to hold them
    with pytest.raises(ConfigError, match="DeepEP has no settings for 3 ranks"):
        plugins.load(PACKAGE, DEEPEP[0], "all2all_backend").create(three)


@pytest.mark.parametrize("name", ALL)
def test_a_library_that_is_not_installed(name: str):
    remedy = (
        "pip install 'nonet[flashinfer]'" if name == FLASHINFER else "build it as github.com/deepseek-ai/DeepEP says"
    )
    with mock.patch.object(_library, "find_spec", return_value=None), pytest.raises(ConfigError) as error:
        plugins.load(PACKAGE, name, "all2all_backend")
    why = f"not available here: the module {LIBRARY[name]} is not installed; {remedy}"
    assert str(error.value) == f"all2all_backend = '{name}': {why}"


# -- with FlashInfer itself, on two GPUs ----------------------------------------------------------------------------


@pytest.fixture
def gpus2(pools) -> Cluster:
    pytest.importorskip("flashinfer")
    return pools.get(2, "cuda")


TWO = {label: replace(case, rows=tuple(r[:2] for r in case.rows)) for label, case in IN_FP8.items()}


@pytest.mark.gpus(2)
@pytest.mark.parametrize("label", [*cases(FLASHINFER, 2), *TWO])
def test_contract_with_flashinfer(gpus2: Cluster, label: str):
    gpus2.run(check_all2all, FLASHINFER, (cases(FLASHINFER, 2) | TWO)[label])


@pytest.mark.gpus(2)
def test_many_passes_with_flashinfer(gpus2: Cluster):
    gpus2.run(check_all2all, FLASHINFER, soak(FLASHINFER, 2, 300))


def in_a_graph(world: World, tokens: int, fp8: bool) -> float:
    """Largest error of an exchange that brings rows back as they are: captured, and replayed with other tokens."""
    D, K, E, device = 256, 3, 16, world.device
    layout = dict(fleet=Fleet.even(world.size, E), top_k=K, hidden_size=D, dtype=torch.bfloat16, max_rows=tokens)
    backend = plugins.load(PACKAGE, FLASHINFER, "all2all_backend").create(
        All2AllSpec(group=world.ep, **layout, exact=False, fp8=fp8)
    )
    assert backend.captures
    generator = torch.Generator().manual_seed(world.rank)

    def draw() -> tuple[Tensor, Tensor]:
        slot_TK = torch.randint(-1, E, (tokens, K), generator=generator).to(device)
        return torch.randn((tokens, D), generator=generator).to(device, torch.bfloat16), slot_TK

    def run() -> Tensor:
        sent = backend.dispatch(x_TD, slot_TK, weight_TK, [tokens] * world.size).wait()
        some_ND = torch.where((sent.pair_NK >= 0).any(dim=1, keepdim=True), sent.rows(), 0)  # what is undefined is 0
        return backend.combine(some_ND, sent).wait()

    def error(y_TD: Tensor) -> float:
        ranks = sum((slot_TK // (E // world.size) == r).any(dim=1, keepdim=True) for r in range(world.size))
        want_TD = x_TD.float() * ranks
        return float((y_TD.float() - want_TD).abs().max() / want_TD.abs().max())

    x_TD, slot_TK = draw()
    weight_TK = torch.ones((tokens, K), device=device)
    errors = [error(run())]
    graph = torch.cuda.CUDAGraph()
    world.ep.barrier()
    with torch.cuda.graph(graph):
        y_TD = run()
    for _ in range(20):
        for mine, new in zip((x_TD, slot_TK), draw(), strict=True):
            mine.copy_(new)
        graph.replay()
        errors.append(error(y_TD))
    backend.close()
    return max(errors)


@pytest.mark.gpus(2)
@pytest.mark.parametrize(("tokens", "fp8", "bound"), [(5, False, 4e-3), (33, False, 4e-3), (33, True, 0.04)])
def test_flashinfer_in_a_graph(gpus2: Cluster, tokens: int, fp8: bool, bound: float):
    assert max(gpus2.run(in_a_graph, tokens, fp8)) <= bound
