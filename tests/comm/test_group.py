"""Collectives against what they mean, with uneven and zero rows, over gloo and NCCL; and what a missing rank causes.

Every rank's rows are numbers made from its rank, so each test says what must come back.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from nonet.comm.group import Group
from nonet.comm.peer import Windows
from nonet.comm.world import World
from nonet.errors import CommError, CommTimeout, EngineDeadError
from nonet.testing.cluster import Cluster, run_ranks

WIDTH = 3
ROWS = [(2, 2, 2, 2), (3, 0, 1, 5), (0, 0, 0, 4), (0, 0, 0, 0)]


def block(world: World, rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`count` rows of a rank: 100 * rank + position."""
    rows = torch.arange(count * WIDTH).view(count, WIDTH) + 100 * rank
    return rows.to(world.device, dtype)


def gather(world: World, rows: tuple[int, ...]) -> tuple[list, int]:
    before = world.ep.calls
    out = world.ep.all_gather_rows(block(world, world.rank, rows[world.rank]), rows).wait()
    return out.tolist(), world.ep.calls - before


@pytest.mark.parametrize("rows", ROWS)
def test_all_gather_rows(cluster: Cluster, rows):
    rows = rows[-cluster.size :]
    want = [[100.0 * r + WIDTH * i + c for c in range(WIDTH)] for r, n in enumerate(rows) for i in range(n)]
    calls = 1 if any(rows) else 0
    assert cluster.run(gather, rows) == [(want, calls)] * cluster.size


def reduce_scatter(world: World, rows: tuple[int, ...]) -> list:
    x_ND = torch.cat([block(world, world.rank + r, n) for r, n in enumerate(rows)])
    return world.ep.reduce_scatter_rows(x_ND, rows).wait().tolist()


@pytest.mark.parametrize("rows", ROWS)
def test_reduce_scatter_rows(cluster: Cluster, rows):
    rows, size = rows[-cluster.size :], cluster.size
    outs = cluster.run(reduce_scatter, rows)
    for rank, (out, count) in enumerate(zip(outs, rows, strict=True)):
        total = 100.0 * sum(source + rank for source in range(size))
        assert out == [[total + size * (WIDTH * i + c) for c in range(WIDTH)] for i in range(count)]


def exchange(world: World, counts: list[list[int]]) -> list:
    """counts[a][b] rows travel from a to b; each says where it comes from and where it goes."""
    send, receive = counts[world.rank], [counts[source][world.rank] for source in range(world.size)]
    rows = [[world.rank, target, i] for target, n in enumerate(send) for i in range(n)]
    x_ND = torch.tensor(rows, dtype=torch.int64, device=world.device).view(-1, 3)
    return world.ep.all_to_all_rows(x_ND, send, receive).wait().tolist()


@pytest.mark.parametrize("pattern", ["even", "uneven", "one sends", "one receives", "nothing"])
def test_all_to_all_rows(cluster: Cluster, pattern):
    size = cluster.size
    count = {
        "even": lambda a, b: 2,
        "uneven": lambda a, b: (3 * a + 5 * b) % 4,
        "one sends": lambda a, b: 2 if a == 1 else 0,
        "one receives": lambda a, b: 3 if b == 0 else 0,
        "nothing": lambda a, b: 0,
    }[pattern]
    counts = [[count(a, b) for b in range(size)] for a in range(size)]
    for rank, out in enumerate(cluster.run(exchange, counts)):
        assert out == [[source, rank, i] for source in range(size) for i in range(counts[source][rank])]


def other_collectives(world: World) -> tuple[list, list, list, str]:
    reduced = world.ep.all_reduce(block(world, world.rank, 2)).wait().tolist()
    sent = world.ep.broadcast(block(world, world.rank, 1), source=1).wait().tolist()
    world.ep.barrier()
    return reduced, sent, world.ep.all_gather_object({"rank": world.rank}), str(world.ep.device.type)


def test_other_collectives(cluster: Cluster, device):
    size = cluster.size
    base = 100.0 * sum(range(size))
    want = (
        [[base + size * (WIDTH * i + c) for c in range(WIDTH)] for i in range(2)],
        [[100.0, 101.0, 102.0]],
        [{"rank": r} for r in range(size)],
        device,
    )
    assert cluster.run(other_collectives) == [want] * size


def types_of(world: World) -> list[str]:
    """Gathers and exchanges in every type that the engine moves."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        x_TD = torch.full((2, WIDTH), world.rank + 1, device=world.device).to(dtype)
        rows = [2] * world.size
        want = torch.arange(1, world.size + 1, device=world.device).repeat_interleave(2)
        gathered = world.ep.all_gather_rows(x_TD, rows).wait()
        x_ND = torch.full((world.size, WIDTH), world.rank + 1, device=world.device).to(dtype)
        ones = [1] * world.size
        exchanged = world.ep.all_to_all_rows(x_ND, ones, ones).wait()
        same = gathered.dtype == dtype and torch.equal(gathered[:, 0].long(), want)
        if not (same and torch.equal(exchanged[:, 1].long(), want[::2])):
            wrong.append(str(dtype))
    return wrong


def test_every_type_travels(cluster: Cluster):
    assert cluster.run(types_of) == [[]] * cluster.size


def several_under_way(world: World) -> list[float]:
    """Three collectives started before the first is waited for."""
    started = [world.ep.all_reduce(torch.full((1,), float(i), device=world.device)) for i in range(3)]
    return [pending.wait().item() for pending in started]


def test_collectives_overlap(cluster: Cluster):
    assert cluster.run(several_under_way) == [[0.0, float(cluster.size), 2.0 * cluster.size]] * cluster.size


def pair_sums(world: World) -> tuple[int, int, float, int]:
    tp = world.tp
    total = tp.all_reduce(torch.tensor([float(world.rank)])).wait().item()
    return world.dp_rank, tp.rank, total, tp.calls


def test_tensor_parallel_groups():
    """Rank = dp_rank x TP + tp_rank; neighbours share a group."""
    outs = run_ranks(4, pair_sums, tensor_parallel_size=2)
    assert outs == [(0, 0, 1.0, 1), (0, 1, 1.0, 1), (1, 0, 5.0, 1), (1, 1, 5.0, 1)]


def alone(world: World) -> list[float]:
    """A group of one: every collective hands back what it got, and none is entered."""
    group = Group([world.rank], world.rank, 1.0, world.device)
    x_TD = block(world, world.rank, 2)
    outs = [
        group.all_reduce(x_TD), group.broadcast(x_TD, 0), group.all_gather_rows(x_TD, [2]),
        group.reduce_scatter_rows(x_TD, [2]), group.all_to_all_rows(x_TD, [2], [2]),
    ]  # fmt: skip
    assert all(torch.equal(out.wait(), block(world, world.rank, 2)) for out in outs)
    group.barrier()
    assert group.all_gather_object("x") == ["x"]
    return [group.rank, group.size, group.calls]


def test_group_of_one(cluster: Cluster):
    assert cluster.run(alone) == [[0, 1, 0]] * cluster.size


def told(group: Group, what: str) -> tuple[str, tuple[int, ...], float]:
    """Enter a collective that not all ranks enter: the error's words, its `missing` and after how long."""
    start, rows = time.monotonic(), [1] * group.size
    call = {
        "all_reduce": lambda: group.all_reduce(torch.ones(1, WIDTH)).wait(),
        "all_gather": lambda: group.all_gather_rows(torch.ones(1, WIDTH), rows).wait(),
        "all_to_all": lambda: group.all_to_all_rows(torch.ones(group.size, WIDTH), rows, rows).wait(),
        "all_gather_object": lambda: group.all_gather_object("here"),
    }[what]
    try:
        call()
    except CommError as error:
        return str(error), error.missing if isinstance(error, CommTimeout) else (), time.monotonic() - start
    return "nothing was raised", (), 0.0


def absent(world: World, late: int, what: str) -> tuple[str, tuple[int, ...], float]:
    """As `told`, in a group that waits for half a second; one rank comes too late."""
    group = Group(range(world.size), world.rank, 0.5, world.device)
    windows = Windows(world.ep, 64)
    group.keep_roll([windows.words(rank, 0, 1) for rank in range(world.size)])
    group.barrier()
    if world.rank == late:
        time.sleep(1.5)
        return "slept", (), 0.0
    return told(group, what)


@pytest.mark.parametrize(
    ("late", "what"), [(0, "all_gather"), (1, "all_reduce"), (3, "all_to_all"), (2, "all_gather_object")]
)
def test_time_out_names_the_missing_rank(cluster4: Cluster, late, what):
    outs = cluster4.run(absent, late, what)
    outs.pop(late)
    for said, _, took in outs:  # a rank whose neighbour gave up first hears of a closed connection
        assert said.startswith(f"{what}:")
        assert f"rank(s) {late}" in said
        assert took < 1.4
    assert (f"{what}: rank(s) {late} did not arrive within 0 s", (late,)) in [out[:2] for out in outs]


def absent_from_the_world(world: World) -> tuple[str, tuple[int, ...], float]:
    world.ep.barrier()
    if world.rank == 1:
        time.sleep(3.0)
        return "slept", (), 0.0
    return told(world.ep, "all_reduce")


def test_the_world_knows_who_is_missing():
    outs = run_ranks(3, absent_from_the_world, comm_timeout_s=2.0)
    assert ("all_reduce: rank(s) 1 did not arrive within 2 s", (1,)) in [out[:2] for out in outs]


def dies(world: World, victim: int) -> None:
    if world.rank == victim:
        raise SystemExit(3)
    world.ep.barrier()


def test_a_collective_with_a_dead_rank_ends():
    with pytest.raises(EngineDeadError, match=r"rank 2 died \(exit code 1\)"):
        run_ranks(3, dies, 2)
