"""The all-to-alls over NVLink on CPU ranks: the same kernels in Triton's interpreter, windows of shared memory.

Run by test_nvlink.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

import importlib
import threading
import time

import pytest
import torch
import triton.language as tl

from nonet import LLM, SamplingParams
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.errors import ConfigError
from nonet.kernels.triton import INTERPRETED, exchange
from nonet.moe.all2all import nvlink_high_throughput
from nonet.moe.base import All2AllSpec
from nonet.testing.cluster import Cluster
from nonet.testing.contracts import Case, cases, check_all2all, soak

SIZE = 3
NAME = "nvlink_low_latency"
assert INTERPRETED


@pytest.fixture
def ranks(pools) -> Cluster:
    return pools.get(SIZE, "cpu")


def possible(label: str, case: Case) -> bool:
    """The interpreter rounds to bfloat16 and FP8 by cutting off, so bits differ there."""
    return not (case.exact and case.dtype == "bfloat16") and label != "fp8 rounded"


@pytest.mark.parametrize("label", [label for label, case in cases(NAME, SIZE).items() if possible(label, case)])
def test_contract(ranks: Cluster, label: str):
    ranks.run(check_all2all, NAME, cases(NAME, SIZE)[label])


@pytest.mark.parametrize("label", ["uneven rows", "exact dropped", "fp8"])
def test_contract_of_the_other(ranks: Cluster, label: str):
    ranks.run(check_all2all, "nvlink_high_throughput", cases("nvlink_high_throughput", SIZE)[label])


def test_passes_back_to_back(ranks: Cluster):
    ranks.run(check_all2all, NAME, soak(NAME, SIZE, 20))


def pushed(world: World, name: str) -> list[tuple[list[int], int]]:
    """On each rank: all flags and the epoch, after each of some exchanges of other numbers of rows."""
    backend = importlib.import_module(f"nonet.moe.all2all.{name}").create(spec_of(world))
    found = []
    for count in (0, 1, 4, 2):
        x_TD, slot_TK = torch.ones((count, 32)), torch.zeros((count, 2), dtype=torch.int64)
        sent = backend.dispatch(x_TD, slot_TK, torch.ones((count, 2)), [count] * world.size).wait()
        world.ep.barrier()
        found.append((backend._arrived.tolist(), int(backend._epoch)))
        backend.combine(backend._y[: len(sent.x_ND)], sent).wait()
    return found


@pytest.mark.parametrize("name", [NAME, "nvlink_high_throughput"])
def test_the_shares_of_a_push_add_up(ranks: Cluster, name: str):
    for found in ranks.run(pushed, name):
        assert found == [([epoch * exchange.WHOLE.value] * SIZE, epoch) for epoch in (2, 3, 4, 5)]


def spec_of(world: World, **more: object) -> All2AllSpec:
    fleet = Fleet.even(world.size, 2 * world.size)
    given = {"top_k": 2, "hidden_size": 32, "dtype": torch.float32, "max_rows": 4, "exact": False}
    return All2AllSpec(group=world.ep, fleet=fleet, **{**given, **more})


def test_a_wait_ends_and_names_who_is_late():
    with Cluster(SIZE, timeout_s=60, comm_timeout_s=2) as cluster:
        said = cluster.run("tests.moe.nvlink_soak:one_stays_away", NAME)
    for text, took in said[:-1]:
        assert text == f"nvlink_low_latency all-to-all: rank(s) {SIZE - 1} did not arrive within 2 s"
        assert took < 1, "once it gave up it does not wait again"


def test_who_comes_too_late_learns_of_it():
    """The others' rows are of no use by then, so it must not go on with them."""
    with Cluster(2, timeout_s=60, comm_timeout_s=2) as cluster:
        said = cluster.run("tests.moe.nvlink_soak:one_stays_away", NAME, 6.0)
    assert [text for text, _ in said] == [
        f"{NAME} all-to-all: rank(s) {other} did not arrive within 2 s" for other in (1, 0)
    ]


def refusals(world: World) -> list[str]:
    said = []
    for more in ({"fp8": True}, {"fp8": True, "dtype": torch.bfloat16, "hidden_size": 200}):
        with pytest.raises(ConfigError) as caught:
            nvlink_high_throughput.create(spec_of(world, **more))
        said.append(str(caught.value))
    return said


def test_fp8_where_it_cannot_be_is_refused(ranks: Cluster):
    for said in ranks.run(refusals):
        assert all("fp8_dispatch" in text and "128" in text for text in said)


def test_the_engine_over_it():
    """nonet-tiny on two ranks, prompts in chunks and decoding: the same tokens as over collectives."""
    found = {}
    for backend in ("allgather_reducescatter", NAME):
        with LLM(
            "nonet-tiny", dtype="float32", data_parallel_size=2, enable_expert_parallel=True, all2all_backend=backend,
            num_blocks=64, max_num_batched_tokens=16, max_num_seqs=8,
        ) as llm:  # fmt: skip
            prompts = ["In the beginning was the word, and then came many more of them", "What", "Three ranks"]
            outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
            found[backend] = [out.outputs[0].token_ids for out in outs]
    assert found[NAME] == found["allgather_reducescatter"]


def test_the_clock_of_a_wait(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, by time: long after the clock was last looked at, a wait still has all of its time; who is late is
    noted once that is over, and then no wait waits."""
    monkeypatch.setattr(exchange, "CLOCK", tl.constexpr(True))
    monkeypatch.setattr(exchange, "globaltimer", lambda: tl.full([], time.time_ns(), tl.int64))
    whole = exchange.WHOLE.value
    flags, epoch, clock = torch.tensor([7 * whole, 7 * whole - 1, 9 * whole]), torch.tensor([6]), torch.tensor([5])
    late, told = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)

    def wait() -> float:
        began = time.monotonic()
        exchange.wait[(1,)](flags, epoch, late, told, clock, 1_500_000_000, 3, RP=4)
        return time.monotonic() - began

    helper = threading.Timer(0.2, lambda: flags.__setitem__(1, 7 * whole))
    helper.start()
    assert wait() >= 0.2
    helper.join()
    assert not late.any()
    assert epoch.item() == 7
    assert wait() >= 1.5
    assert late.tolist() == told.tolist() == [8, 8, 0]
    epoch.fill_(9)
    assert wait() < 1.5
    assert late.tolist() == [8, 8, 0]
