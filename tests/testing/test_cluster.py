"""Pools of ranks: results come back in order, and whatever goes wrong on a rank is raised here, naming it, in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import psutil
import pytest
import torch

from nonet.comm.world import World
from nonet.errors import CommTimeout, ConfigError, EngineDeadError
from nonet.testing.cluster import Cluster, run_ranks
from tests.processes import living


def where(world: World, *args: object) -> tuple:
    return world.rank, world.size, os.getpid(), args


def test_results_come_in_rank_order(cluster4: Cluster):
    outs = cluster4.run(where, "a", {"b": torch.ones(2)})
    assert [(rank, size) for rank, size, _, _ in outs] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert len({pid for _, _, pid, _ in outs} | {os.getpid()}) == 5
    assert all(args[0] == "a" and torch.equal(args[1]["b"], torch.ones(2)) for _, _, _, args in outs)


def test_ranks_are_reused(cluster4: Cluster):
    first, second = (cluster4.run("tests.testing.test_cluster:where") for _ in range(2))
    assert first == second
    assert sorted(cluster4.pids[1:]) == sorted(pid for _, _, pid, _ in first)


def test_run_ranks_with_tensor_parallelism():
    assert run_ranks(2, layout, tensor_parallel_size=2) == [(2, 0, 0), (2, 0, 1)]


def layout(world: World) -> tuple[int, int, int]:
    return world.tp.size, world.dp_rank, world.tp.rank


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("words of an odd error")
        self.hold = lambda: (a, b)


def fails(world: World, how: str) -> None:
    if world.rank == 1:
        if how == "config":
            raise ConfigError("backend", "x", "use y")
        if how == "odd":
            raise Unpicklable(1, 2)
        if how == "warning":
            warnings.warn("soon gone", FutureWarning, stacklevel=1)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    world.ep.barrier()  # the others wait for it in vain


@pytest.fixture
def fragile(pools) -> Cluster:
    """A pool for what breaks pools."""
    cluster = pools.get(3)
    cluster.run(where)
    return cluster


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("config", ConfigError, "backend = 'x': use y"),
        ("odd", EngineDeadError, "words of an odd error"),
        ("warning", FutureWarning, "soon gone"),
        ("kill", EngineDeadError, r"fails: rank 1 died \(SIGKILL\)"),
    ],
)
def test_a_failing_rank_is_named_with_its_traceback(fragile: Cluster, how, kind, words):
    start = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        fragile.run(fails, how)
    assert time.monotonic() - start < 8  # the others' wait would have lasted longer
    if how != "kill":
        (note,) = caught.value.__notes__
        assert note.startswith("on rank 1 of 3")
        assert "in fails" in note
    assert [out[0] for out in fragile.run(where)] == [0, 1, 2]  # the next run has fresh ranks


def hangs(world: World) -> int:
    if world.rank == 1:
        time.sleep(600)
    return world.rank


def test_a_hanging_rank_is_named(fragile: Cluster):
    start = time.monotonic()
    with pytest.raises(CommTimeout, match=r"hangs: rank\(s\) 1 did not arrive within 1 s") as caught:
        fragile.run(hangs, timeout_s=1.0)
    assert caught.value.missing == (1,)
    assert time.monotonic() - start < 10


def test_a_rank_killed_between_runs_is_named(fragile: Cluster):
    pids = [pid for _, _, pid, _ in fragile.run(where)]
    os.kill(pids[2], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 2 died"):
        fragile.run(where)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_supervisor_killed_between_runs(fragile: Cluster):
    supervisor, *ranks = fragile.pids
    os.kill(supervisor, signal.SIGKILL)
    assert living(ranks, zombies=True) == []
    with pytest.raises(EngineDeadError, match="supervisor ended"):
        fragile.run(where)


def test_a_function_must_be_importable(cluster2: Cluster):
    def inner(world: World) -> None: ...

    with pytest.raises(ValueError, match="not at its module's top level"):
        cluster2.run(inner)
    with pytest.raises(ImportError, match=r"no_such_module"):
        run_ranks(1, "no_such_module:f")


def test_close_ends_every_process_and_twice_is_fine():
    cluster = Cluster(2)
    cluster.run(where)
    pids = cluster.pids
    assert len(pids) == 3
    cluster.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    cluster.close()
    assert cluster.pids == []


def test_killing_the_parent_ends_the_ranks():
    script = (
        "import time; from nonet.testing.cluster import Cluster\n"
        "from tests.testing.test_cluster import where\n"
        "c = Cluster(2); c.run(where); print(*c.pids, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    assert living(pids, zombies=True) == []
