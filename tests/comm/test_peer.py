"""Windows of shared memory: every rank sees what any rank wrote, and nothing outlives the processes."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from nonet.comm.peer import Windows, align
from nonet.comm.wait import fence
from nonet.comm.world import World
from nonet.errors import CommError
from nonet.testing.cluster import Cluster
from tests.processes import living


def everyone_writes_everywhere(world: World) -> list[list[float]]:
    """Rank r writes its number into row r of every window; each returns its own window and what it sees in others'."""
    windows = Windows(world.ep, 64 + 4 * world.size * 3)
    shape = (world.size, 3)
    for target in range(world.size):
        windows.tensor(target, 64, shape, torch.float32)[world.rank] = 10.0 * world.rank + target
    fence()
    world.ep.barrier()
    seen = [windows.tensor(r, 64, shape, torch.float32)[:, 0].tolist() for r in range(world.size)]
    world.ep.barrier()
    return seen


def test_all_ranks_see_all_windows(cluster4: Cluster):
    want = [[10.0 * writer + owner for writer in range(4)] for owner in range(4)]
    assert cluster4.run(everyone_writes_everywhere) == [want] * 4


def words(world: World) -> list[list[int]]:
    windows = Windows(world.ep, 128)
    own = windows.words(world.rank, 64, 2)
    own[0], own[1] = world.rank - 1, 1 << 40
    fence()
    world.ep.barrier()
    return [list(windows.words(r, 64, 2)) for r in range(world.size)]


def test_words_are_int64(cluster4: Cluster):
    assert cluster4.run(words) == [[[r - 1, 1 << 40] for r in range(4)]] * 4


def types_in_a_window(world: World) -> list[bool]:
    windows = Windows(world.ep, 4096)
    same = []
    for i, dtype in enumerate((torch.bfloat16, torch.int64, torch.uint8, torch.float32)):
        mine = torch.arange(6).view(2, 3).to(dtype) + world.rank
        windows.tensor(world.rank, 64 * i, (2, 3), dtype).copy_(mine)
        world.ep.barrier()
        other = (world.rank + 1) % world.size
        same.append(
            torch.equal(windows.tensor(other, 64 * i, (2, 3), dtype), torch.arange(6).view(2, 3).to(dtype) + other)
        )
    world.ep.barrier()
    return same


def test_tensors_of_every_type(cluster2: Cluster):
    assert cluster2.run(types_in_a_window) == [[True] * 4] * 2


def mappings() -> int:
    return sum("memfd:nonet" in line for line in Path("/proc/self/maps").read_text().splitlines())


def made_and_dropped(world: World) -> tuple[int, int, int]:
    """Mappings of this process before, with and after ten windows; a tensor keeps its window mapped."""
    gc.collect()
    before = mappings()
    many = [Windows(world.ep, 1 << 16) for _ in range(10)]
    tensor = many[0].tensor((world.rank + 1) % world.size, 0, (4,), torch.float32)
    during = mappings()
    world.ep.barrier()
    many.clear()
    gc.collect()
    world.ep.barrier()
    tensor += 1
    kept = mappings()
    del tensor
    gc.collect()
    assert mappings() == before
    return before, during, kept


def test_memory_goes_with_its_last_user(cluster2: Cluster):
    for before, during, kept in cluster2.run(made_and_dropped):
        assert during - before == 20  # ten windows of two ranks
        assert kept - before == 1


def different_hosts(world: World) -> str:
    with mock.patch("socket.gethostname", return_value=f"host-{world.rank}"), pytest.raises(CommError) as caught:
        Windows(world.ep, 64)
    return str(caught.value)


def test_ranks_of_several_hosts_are_refused(cluster2: Cluster):
    said = "shared memory needs all ranks on one host, these are on ['host-0', 'host-1']"
    assert cluster2.run(different_hosts) == [said] * 2


def hold(world: World) -> int:
    """Make a window full of memory and keep it for good."""
    windows = Windows(world.ep, 8 << 20)
    windows.tensor(world.rank, 0, (8 << 20,), torch.uint8).fill_(1)
    globals()["_held"] = windows
    return os.getpid()


def test_killed_ranks_leave_no_memory():
    """kill -9 of the ranks: the files had no names, so nothing of them is left anywhere."""
    shared = set(os.listdir("/dev/shm"))
    cluster = Cluster(2)
    pids = cluster.run(hold)
    assert set(os.listdir("/dev/shm")) == shared  # not even while they live
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert living(pids, zombies=True) == []
    cluster.close()
    assert set(os.listdir("/dev/shm")) == shared


def test_align():
    assert [align(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


def misplaced(world: World) -> str:
    with pytest.raises(AssertionError) as caught:
        Windows(world.ep, 256).tensor(0, 8, (1,), torch.float32)
    return str(caught.value)


def test_tensors_start_on_cache_lines(cluster2: Cluster):
    assert cluster2.run(misplaced) == ["tensors in a window start on a cache line"] * 2
