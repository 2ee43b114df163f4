"""Shared by all tests: pools of ranks, devices, and the check that a test leaves nothing behind.

Starting ranks costs seconds, so `cluster2` and `cluster4` live as long as the session. What a test starts itself must
be gone when it ends: a new process, a new file in /dev/shm or a listening port is an error of that test.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from nonet.testing.cluster import Cluster

_MARK = "NONET_TEST_SESSION"  # in the environment of every process that this session starts
_GRACE_S = 5.0  # what was told to end may take as long

os.environ[_MARK] = str(os.getpid())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that asks for more GPUs than there are is skipped, with the reason."""
    wanted = 1 if item.get_closest_marker("gpu") else 0
    several = item.get_closest_marker("gpus")
    wanted = max(wanted, several.args[0] if several else 0)
    if wanted:
        import torch

        there = torch.cuda.device_count()
        if there < wanted:
            pytest.skip(f"needs {wanted} CUDA device(s), here are {there}")


class Pools:
    """Clusters by size and device, started when first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], Cluster] = {}

    def get(self, size: int, device: str = "cpu") -> Cluster:
        from nonet.testing.cluster import Cluster

        if (size, device) not in self._made:
            self._made[size, device] = Cluster(size, device=device, timeout_s=120.0, comm_timeout_s=30.0)
        return self._made[size, device]

    @property
    def pids(self) -> set[int]:
        return {pid for cluster in self._made.values() for pid in cluster.pids}

    def close(self) -> None:
        for cluster in self._made.values():
            cluster.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def cluster2(pools: Pools) -> Cluster:
    return pools.get(2)


@pytest.fixture(scope="session")
def cluster4(pools: Pools) -> Cluster:
    return pools.get(4)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpus(2))])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on CPUs and, where there are two, on GPUs."""
    return request.param


@pytest.fixture
def cluster(device: str, pools: Pools) -> Cluster:
    """Four ranks on CPUs, or two on GPUs."""
    return pools.get(4 if device == "cpu" else 2, device)


@pytest.fixture(autouse=True)
def _nothing_left(pools: Pools) -> Iterator[None]:
    processes, shared, ports = set(psutil.pids()), set(os.listdir("/dev/shm")), _ports()
    yield
    deadline = time.monotonic() + _GRACE_S
    while left := _left(processes, pools.pids, shared, ports):
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + ", ".join(left))
        time.sleep(0.02)


def _left(processes: set[int], pooled: set[int], shared: set[str], ports: set[int]) -> list[str]:
    """What is there now and was not before, if this session made it."""
    new = set(psutil.pids()) - processes - pooled
    out = [f"process {pid} ({words})" for pid in new if (words := _ours(pid, pooled))]
    out += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared if not _someone_elses(name, pooled)]
    return out + [f"listening port {port}" for port in _ports() - ports]


def _ours(pid: int, pooled: set[int]) -> str:
    """The command line of a living process that this session started outside its pools; "" for any other."""
    try:
        process = psutil.Process(pid)
        parent = process.ppid()
        if process.status() == psutil.STATUS_ZOMBIE or parent in pooled:  # the latter: ranks of a pool just started
            return ""
        if parent != os.getpid() and process.environ().get(_MARK) != str(os.getpid()):
            return ""
        return " ".join(process.cmdline())[:80] or process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _someone_elses(name: str, pooled: set[int]) -> bool:
    """Whether this file of /dev/shm is gone, of a kind that nonet never makes, or held by a pool or another session."""
    path = f"/dev/shm/{name}"
    if name.startswith(("sem.", "__KMP_")) or not os.path.exists(path):  # semaphores, Intel's OpenMP
        return True
    for process in psutil.process_iter():
        try:
            ours = process.pid == os.getpid() or process.environ().get(_MARK) == str(os.getpid())
            if (not ours or process.pid in pooled) and path in Path(f"/proc/{process.pid}/maps").read_text():
                return True
        except (psutil.Error, OSError):
            continue
    return False


def _ports() -> set[int]:
    """TCP ports on which this process listens."""
    return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
