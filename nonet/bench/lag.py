"""Whether the load client itself keeps up: how late its event loop is, and how much of a core it uses.

A client that is late sends late and stamps tokens late, and would blame the server for it. Used by `bench.serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np

TICK_S = 0.01
_LATE_MS = 10.0  # below this nobody's figures change
_LATE_SHARE = 0.25  # of the median inter-token latency
_BUSY = 0.9  # of a core


class Lag:
    """Measures inside an `async with` block. Times are seconds."""

    def __init__(self) -> None:
        self.ticks: list[float] = []  # how late each wake-up of the event loop was
        self.starts: list[float] = []  # how late each request was started, other than for lack of concurrency
        self.cpu = 0.0  # share of a core this process used

    async def __aenter__(self) -> Lag:
        self._began = time.perf_counter(), time.process_time()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        wall = time.perf_counter() - self._began[0]
        self.cpu = (time.process_time() - self._began[1]) / wall if wall > 0 else 0.0

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.ticks.append(max(0.0, time.perf_counter() - due))

    def figures(self) -> dict[str, float]:
        """For the result: the 99th percentiles in ms, and the share of a core."""
        return {
            "client_loop_lag_p99_ms": _p99_ms(self.ticks),
            "client_start_lag_p99_ms": _p99_ms(self.starts),
            "client_cpu_cores": round(self.cpu, 3),
        }

    def warning(self, itls: list[float], *, timed: bool) -> str | None:
        """What to tell the user if the client was slower than the load; `itls` are the seconds it measured.

        timed: requests had times at which they were due, so that starting late is a fault and not the order of things.
        """
        figures, limit = self.figures(), _LATE_MS
        if itls:
            limit = max(limit, _LATE_SHARE * 1000 * float(np.median(itls)))
        reasons = []
        if figures["client_loop_lag_p99_ms"] > limit:
            reasons.append(f"it woke up {figures['client_loop_lag_p99_ms']:.1f} ms late (p99)")
        if timed and figures["client_start_lag_p99_ms"] > limit:
            reasons.append(f"it sent requests {figures['client_start_lag_p99_ms']:.1f} ms late (p99)")
        if self.cpu > _BUSY:
            reasons.append(f"it used {self.cpu:.0%} of a core")
        if not reasons:
            return None
        return (
            f"this client was slower than the load: {', '.join(reasons)}; the latencies below contain that. Give it a "
            "core of its own, or share the load among several clients"
        )


def _p99_ms(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1000 if seconds else 0.0
