"""Shared by benchmarks of GPUs: none of them says anything without one, and calls are timed in graphs."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def need_gpus(count: int = 1) -> None:
    """Ends the program with one line where there are fewer."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        sys.exit(f"{Path(sys.argv[0]).name}: needs {count} GPU{'s' if count > 1 else ''}, found {found}")


def in_graph(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Microseconds of one call: all of them in one graph, the median of its replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
