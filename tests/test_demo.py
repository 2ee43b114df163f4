"""The demo as a person runs it: four ranks, every kind of text, tables that add up, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from nonet.cli.demo import beginning, prompts_by_kind
from nonet.config.checkpoint import SHIPPED

KINDS = sorted(path.stem for path in (SHIPPED / "heldout").glob("*.txt"))
MARK = "NONET_TEST_DEMO"
RANKS, MAX_TOKENS = 4, 6


def processes_of(mark: str) -> list[int]:
    """Processes that inherited the demo's environment, however they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:  # it ended, or it is another user's
                continue
            if f"{MARK}={mark}".encode() in environ.split(b"\0"):
                found.append(int(entry.name))
    return found


def start(*arguments: str, mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nonet", "demo", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark, "COLUMNS": "100"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by a shell's background jobs
    )  # fmt: skip


def left_behind(mark: str, seconds: float) -> list[int]:
    """Processes that are still there after so long."""
    deadline = time.monotonic() + seconds
    while (still := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return still


@pytest.fixture(scope="module")
def ranks_wanted(request) -> None:
    """Not with `scripts/test --fast`."""
    if request.config.pluginmanager.has_plugin("_fast"):
        pytest.skip("starts rank processes")


@pytest.fixture(scope="module")
def demo(ranks_wanted) -> tuple[int, list[str], str, list[int], set[str]]:
    """(exit code, lines, standard error, processes left, shared memory left)."""
    mark, before = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
    with start("--ranks", str(RANKS), "--max-tokens", str(MAX_TOKENS), mark=mark) as process:
        out, err = process.communicate(timeout=120)
    new = {name for name in set(os.listdir("/dev/shm")) - before if str(process.pid) in name or "nonet" in name}
    return process.returncode, out.splitlines(), err, left_behind(mark, 0), new


def test_it_ends_well_and_leaves_nothing(demo):
    code, _, err, processes, shared_memory = demo
    assert (code, err) == (0, "")
    assert (processes, shared_memory) == ([], set())


def test_the_first_line_says_what_is_started(demo):
    spec = r"nonet-tiny: \d+ MoE layers of 32 experts, top-4, on 4 ranks \(DP 4, EP 4\)"
    rest = r"all-to-all shm, experts \w+, float32, threads a rank: \d+"
    assert re.fullmatch(f"{spec}, {rest}", demo[1][0])


def test_every_kind_is_streamed(demo):
    lines = demo[1]
    assert [line for line in lines if line in KINDS] == KINDS
    prompts = [re.match(r"  rank (\d) #(\d+) > (.+)", line) for line in lines]
    started = [(int(m[2]), int(m[1])) for m in prompts if m]
    assert sorted(request for request, _ in started) == list(range(4 * len(KINDS)))
    assert {rank for _, rank in started} == set(range(RANKS)), "every rank served requests"
    continued = {int(m[2]) for line in lines if (m := re.match(r"  rank (\d) #(\d+)   .+", line))}
    assert len(continued) >= len(KINDS), "text came back"


def test_the_tables_add_up(demo):
    lines = demo[1]
    by_rank = [row for line in lines if (row := re.fullmatch(r" +(\d) +(\d+) +(\d+) +(\d+) +([\d.]+)% *", line))]
    assert [int(row[1]) for row in by_rank] == list(range(RANKS))
    assert sum(int(row[2]) for row in by_rank) == 4 * len(KINDS)
    made, read = map(int, re.findall(r"\d+", lines[-1])[:2])
    tokens = sum(int(row[3]) for row in by_rank)
    assert read < tokens <= read + made, "each prompt token and each token but the last of a request is run"
    layers, top_k = 5, 4
    pairs = sum(int(row[4]) for row in by_rank)
    assert abs(pairs - tokens * layers * top_k) <= RANKS, "rounded to whole pairs by rank"
    assert sum(float(row[5]) for row in by_rank) == pytest.approx(100, abs=0.3)

    table = re.compile(r" +(\w+) +([\d.]+) +([\d.]+)((?: +\d+%){4}) *")
    imbalance = {row[1]: row for line in lines if (row := table.fullmatch(line))}
    assert list(imbalance) == [*KINDS, "all"]
    for row in imbalance.values():
        assert 0 < float(row[2]) <= float(row[3]) <= RANKS - 1
        assert sum(int(part) for part in re.findall(r"\d+", row[4])) == pytest.approx(100, abs=2)


def test_the_rate_is_positive(demo):
    found = re.fullmatch(r"(\d+) tokens generated from (\d+) of prompts in ([\d.]+) s: (\d+) tokens/s", demo[1][-1])
    assert found is not None
    assert int(found[4]) == pytest.approx(int(found[1]) / float(found[3]), rel=0.2)


def test_interrupted_it_leaves_nothing(ranks_wanted):
    """Ctrl-C in the middle: exit code 130, no traceback, no process."""
    mark = uuid.uuid4().hex
    with start("--max-tokens", "400", mark=mark) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("  rank"):
            assert process.poll() is None
        assert len(processes_of(mark)) >= 2 + RANKS, "the command, the supervisor and the ranks are seen"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        err = process.stderr.read()
    assert (process.returncode, err) == (130, "")
    assert left_behind(mark, 2) == []


def test_prompts_are_beginnings_of_segments():
    prompts = prompts_by_kind(3)
    assert list(prompts) == KINDS
    for kind, texts in prompts.items():
        whole = (SHIPPED / "heldout" / f"{kind}.txt").read_text(encoding="utf-8")
        segments = [segment.strip() for segment in whole.split("\n\f\n")]
        assert len(texts) == 3
        assert all(text and any(s.startswith(text) and text != s for s in segments) for text in texts)


def test_a_beginning_ends_between_words():
    assert beginning("one two three four five six") == "one two"
    assert beginning("x" * 1000) == "x" * 160
    assert beginning("word " * 100) == ("word " * 32).strip()
