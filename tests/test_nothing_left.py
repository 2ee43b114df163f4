"""The checks in `conftest` and `processes` see what they are there to see: processes, orphans, shared memory, ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil

from tests import conftest
from tests.processes import living, started_by


def left(before: tuple[set[int], set[str], set[int]]) -> list[str]:
    processes, shared, ports = before
    return conftest._left(processes, set(), shared, ports)


def now() -> tuple[set[int], set[str], set[int]]:
    return set(psutil.pids()), set(os.listdir("/dev/shm")), conftest._ports()


def test_sees_a_process():
    before = now()
    with subprocess.Popen(["sleep", "60"]) as process:
        seen = left(before)
        process.kill()
    assert [entry.split(" (")[0] for entry in seen] == [f"process {process.pid}"]
    assert left(before) == []


def test_sees_an_orphan():
    """A grandchild whose parent has ended carries the mark of this session in its environment."""
    before = now()
    script = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid)"
    orphan = psutil.Process(int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", script])))
    assert orphan.ppid() != os.getpid()
    seen = left(before)
    orphan.kill()
    assert [entry.split(" (")[0] for entry in seen] == [f"process {orphan.pid}"]
    assert living([orphan.pid]) == []
    assert left(before) == []


def test_a_zombie_has_ended():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert living([process.pid], within_s=0.1) == [process.pid]
        assert [p.pid for p in started_by(os.getpid(), "sleep 60")] == [process.pid]
        process.kill()
        assert living([process.pid]) == []
        assert started_by(os.getpid(), "sleep 60") == started_by(process.pid) == []
        assert living([process.pid], within_s=0.1, zombies=True) == [process.pid]
    assert living([process.pid], zombies=True) == started_by(process.pid) == []


def test_sees_shared_memory():
    before = now()
    path = f"/dev/shm/nonet-left-{os.getpid()}"
    with open(path, "w") as file:
        file.write("x")
        assert left(before) == [path]
    os.unlink(path)
    assert left(before) == []


def test_sees_a_port():
    before = now()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert left(before) == [f"listening port {server.getsockname()[1]}"]
    assert left(before) == []
