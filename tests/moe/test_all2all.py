"""Every all-to-all keeps the contract of `nonet.testing.contracts`, over gloo and, with two GPUs, over NCCL.

A new file in nonet/moe/all2all is tested without a change here.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nonet import plugins
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.config.roles import ROLES
from nonet.errors import ConfigError
from nonet.moe.all2all import shm
from nonet.moe.base import All2AllSpec
from nonet.testing.cluster import Cluster
from nonet.testing.contracts import Case, Report, cases, check_all2all, soak
from nonet.testing.routing import KINDS

ADAPTERS = {name for name, role in ROLES.items() if role.library}  # test_adapters has them
NAMES = [name for name in plugins.names("nonet.moe.all2all") if name not in ADAPTERS]
CPU_ONLY = {"shm"}
GPU_ONLY = {name for name in NAMES if name.startswith("nvlink_")}  # on CPUs test_nvlink runs them, in the interpreter
MOVERS = [name for name in NAMES if name not in ("local", "tensor")]  # they give the same bits with combine: exact
TWO_GPUS = pytest.mark.gpus(2)

PLACES = [("cpu", 2), ("cpu", 4), pytest.param("cuda", 2, marks=TWO_GPUS)]


def settled(reports: list[Report]) -> list[Report]:
    """Every rank entered as many collectives as the others."""
    assert len({report.calls for report in reports}) == 1, reports
    return reports


def all_cases() -> list:
    out = []
    for name in NAMES:
        for device, size, marks in (("cpu", 4, ()), ("cuda", 2, TWO_GPUS)):
            if name in (CPU_ONLY if device == "cuda" else GPU_ONLY):
                continue
            out += [
                pytest.param(name, device, size, case, marks=marks, id=f"{name}-{device}-{label}")
                for label, case in cases(name, size).items()
            ]
    return out


@pytest.mark.parametrize(("name", "device", "size", "case"), all_cases())
def test_contract(pools, name: str, device: str, size: int, case: Case):
    settled(pools.get(size, device).run(check_all2all, name, case))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GPU_ONLY])
def test_five_hundred_passes_back_to_back(cluster4: Cluster, name: str):
    settled(cluster4.run(check_all2all, name, soak(name, 4, 500)))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CPU_ONLY])
def test_many_passes_back_to_back_on_gpus(pools, name: str):
    settled(pools.get(2, "cuda").run(check_all2all, name, soak(name, 2, 100)))


@pytest.mark.parametrize(("device", "size"), PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_gives_the_same_bits_under_every_backend_and_placement(pools, device: str, size: int, dtype: str):
    """The suite compares with the local backend; here all results are compared with each other, too."""
    cluster, digests = pools.get(size, device), {}
    for name in [n for n in MOVERS if n not in (GPU_ONLY if device == "cpu" else CPU_ONLY)]:
        for slots, scrambled in ((8, False), (8, True), (11, True)):
            case = Case(((5, 9, 0, 3)[:size],), exact=True, dtype=dtype, num_slots=slots, scrambled=scrambled, top_k=3)
            digests[name, slots, scrambled] = [r.digest for r in settled(cluster.run(check_all2all, name, case))]
    first = next(iter(digests.values()))
    assert len(set(first)) == size  # ranks have different tokens
    assert all(digest == first for digest in digests.values()), digests


@st.composite
def any_case(draw: st.DrawFn, size: int = 2) -> tuple[str, Case]:
    name = draw(st.sampled_from([name for name in NAMES if name not in GPU_ONLY]))
    num_experts = draw(st.integers(1, 9))
    plain = name == "tensor"
    exact = not plain and draw(st.booleans())
    return name, Case(
        rows=tuple(draw(st.lists(st.tuples(*[st.integers(0, 12)] * size), min_size=1, max_size=3))),
        routing=draw(st.sampled_from(sorted(KINDS))),
        num_experts=num_experts,
        num_slots=None if plain else num_experts + draw(st.integers(0, 4)),
        top_k=draw(st.integers(1, num_experts)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        exact=exact,
        scrambled=not plain and draw(st.booleans()),
        hidden_size=draw(st.integers(1, 40)),
        intermediate=draw(st.integers(size, 20)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None, derandomize=True, phases=[Phase.generate])  # each failure costs a pool
@given(drawn=any_case())
def test_any_shape(cluster2: Cluster, drawn: tuple[str, Case]):
    settled(cluster2.run(check_all2all, *drawn))


# -- shm: what makes it one-sided ---------------------------------------------------------------------------------


def without_collectives(world: World, case: Case) -> tuple[int, str]:
    """Run shm with every function of torch.distributed made to fail once the backend is built."""

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.distributed was called")

    functions = [n for n in dir(dist) if callable(getattr(dist, n)) and n[0].islower()]
    patches = [mock.patch.object(dist, name, refused) for name in functions]
    patches += [mock.patch(f"nonet.comm.group.{name}", refused) for name in ("_gather_into", "_reduce_scatter")]
    patches.append(mock.patch.object(world.ep, "_start", refused))
    real = shm.create

    def create(spec: All2AllSpec) -> object:
        backend = real(spec)
        for patch in patches:
            patch.start()
        return backend

    before = world.ep.calls
    try:
        with mock.patch.object(shm, "create", create):
            check_all2all(world, "shm", case)
        with pytest.raises(AssertionError, match=r"torch\.distributed was called"):
            world.ep.barrier()  # the trap works
    finally:
        for patch in patches:
            patch.stop()
    return world.ep.calls - before, "all_to_all_single" in functions and "done"


@pytest.mark.parametrize("exact", [False, True])
def test_shm_makes_no_collective_call(cluster4: Cluster, exact: bool):
    case = Case(((4, 4, 4, 4), (0, 9, 1, 3), (2, 2, 2, 2)), exact=exact)
    assert cluster4.run(without_collectives, case) == [(4, "done")] * 4  # all before its two windows were there


def refused_on_gpu(world: World) -> str:
    spec = All2AllSpec(world.ep, Fleet((4, 4)), 2, 16, torch.float32, 8, exact=False)
    with pytest.raises(ConfigError) as caught:
        shm.create(spec)
    return str(caught.value)


@pytest.mark.gpus(2)
def test_shm_refuses_gpus(pools):
    said = "all2all_backend = 'shm': moves CPU tensors; on GPUs use nvlink_low_latency"
    assert pools.get(2, "cuda").run(refused_on_gpu) == [said] * 2
