"""The supervisor of a host's ranks: who ends whom, and what it says about it. No test leaves a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nonet.launch.local import Node
from tests.processes import living

ROOT = str(Path(__file__).parent.parent.parent)
ENV = {"PYTHONPATH": ROOT}


@contextmanager
def node(entry: str, num_ranks: int, **payload: Any) -> Iterator[tuple[Node, list[int]]]:
    """A node and the process ids of its ranks; closed at the end, and then none of them lives."""
    made = Node(f"tests.launch.entries:{entry}", num_ranks, payload, {**ENV, "NONET_WORD": "bee"})
    try:
        started = made.next_event()
        assert started is not None
        assert started["event"] == "started"
        assert len(started["pids"]) == num_ranks
        yield made, started["pids"]
    finally:
        made.close()
    assert living([made.pid, *started["pids"]]) == []


def rest_of(events: Node) -> list[dict[str, Any]]:
    return list(iter(events.next_event, None))


def test_ranks_that_end_well(tmp_path, capfd):
    with node("leave", 3, folder=str(tmp_path)) as (made, _):
        assert rest_of(made) == [{"event": "done"}]
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(s["rank"], s["size"], s["local_rank"]) for s in said] == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]
    assert [s["listen_fd"] is None for s in said] == [False, True, True]  # rank 0 holds the meeting point
    assert len({(s["host"], s["port"]) for s in said}) == 1
    assert all(s["stdin"] == "" and s["word"] == "bee" for s in said)
    assert capfd.readouterr().err.count("this must not reach the events") == 3


@pytest.mark.parametrize(
    ("how", "reported"),
    [("raise", "exit code 1"), ("exit", "exit code 7"), ("SIGKILL", "SIGKILL"), ("SIGSEGV", "SIGSEGV")],
)
def test_a_rank_that_dies_is_named_and_ends_the_others(how, reported, capfd):
    with node("end", 3, rank=1, how=how) as (made, pids):
        assert rest_of(made) == [{"event": "died", "rank": 1, "how": reported}, {"event": "done"}]
        assert living(pids) == []
    assert ("ValueError: on purpose" in capfd.readouterr().err) == (how == "raise")


def test_killing_a_rank_from_outside():
    with node("rest", 4) as (made, pids):
        os.kill(pids[2], signal.SIGKILL)
        assert made.next_event() == {"event": "died", "rank": 2, "how": "SIGKILL"}
        assert living(pids) == []


def test_the_kill_that_made_others_end_is_reported_first(tmp_path):
    """A supervisor that comes late finds both ended."""
    with node("exits", 2, folder=str(tmp_path)) as (made, pids):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(made.pid, signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        os.kill(pids[0], signal.SIGTERM)
        assert living(pids) == []
        os.kill(made.pid, signal.SIGCONT)
        died = [event for event in rest_of(made) if event["event"] == "died"]
        assert [(event["rank"], event["how"]) for event in died] == [(1, "SIGKILL"), (0, "exit code 7")]


def test_closing_the_leash_ends_the_ranks():
    with node("rest", 3) as (made, pids):
        made.close()
        assert living([made.pid, *pids], within_s=0.1) == []  # close() returns when they are gone
        made.close()  # and may be called again


def test_ranks_deaf_to_signals_end_too():
    with node("deaf", 2) as (made, pids):
        made.close()
        assert living(pids, within_s=0.1) == []


def test_killing_the_supervisor_ends_the_ranks():
    with node("rest", 3) as (made, pids):
        os.kill(made.pid, signal.SIGKILL)
        assert rest_of(made) == []
        assert living(pids) == []


def test_killing_the_parent_ends_all():
    script = (
        "import time; from nonet.launch.local import Node\n"
        f"node = Node('tests.launch.entries:rest', 3, {{}}, {ENV!r})\n"
        "print(node.pid, *node.next_event()['pids'], flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **ENV}, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(psutil.pid_exists, pids))
        parent.kill()
    assert living(pids) == []


def test_interrupt_is_left_to_the_front_end():
    """Ctrl-C reaches the front end's process group only: the ranks are in another."""
    with node("rest", 2) as (made, pids):
        groups = {os.getpgid(pid) for pid in [made.pid, *pids]}
        assert os.getpgid(0) not in groups
        assert made.pid in groups


@pytest.mark.parametrize("entry", ["tests.launch.nowhere:rest", "tests.launch.entries:nothing"])
def test_an_entry_that_cannot_be_imported(entry, capfd):
    made = Node(entry, 2, {}, ENV)
    assert made.next_event() is None
    made.close()
    assert "Error" in capfd.readouterr().err
    assert living([made.pid]) == []


def test_the_supervisor_needs_no_torch():
    script = "import sys, nonet.launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
