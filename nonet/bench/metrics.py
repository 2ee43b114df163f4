"""From what happened to each request to the figures of a run. The words and keys are vLLM's; times in are seconds.

    TTFT  time to first token: from sending the request to its first token
    ITL   inter-token latency: each gap between two arrivals of tokens
    TPOT  time per output token after the first: (E2EL - TTFT) / (tokens - 1), of requests with two tokens or more
    E2EL  end-to-end latency: from sending the request to its last token

Used by the runners; pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nonet.errors import ConfigError, nearest

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
OBJECTIVES = ("ttft", "tpot", "e2el")  # what a request as a whole has


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds; `start` is on the clock of time.perf_counter."""

    prompt_len: int = 0
    output_len: int = 0
    start: float = 0.0
    ttft: float | None = None  # None: no token came
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    text: str = ""
    error: str = ""  # why it failed; "" if it did not
    queue_time: float = 0.0  # from its arrival time until it was sent, for lack of concurrency

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None if there was no second one."""
        if self.ttft is None or self.output_len < 2:
            return None
        return (self.latency - self.ttft) / (self.output_len - 1)


def summary(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a run of `duration` seconds. Failed requests are counted and contribute no tokens and no times.

    `goodput` maps objectives (ttft, tpot, e2el) to ms. A statistic of no values at all is 0, as in vLLM.
    """
    done = [outcome for outcome in outcomes if not outcome.error]
    tokens_in, tokens_out = sum(o.prompt_len for o in done), sum(o.output_len for o in done)
    good = sum(meets(outcome, goodput) for outcome in done) if goodput else None
    out: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": None if good is None else good / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": peak_tokens(done),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for metric in metrics:
        out |= statistics(metric, values_of(metric, done), percentiles)
    return out


def values_of(metric: str, done: Iterable[Outcome]) -> list[float]:
    """All values of a metric in seconds, of requests that did not fail."""
    match metric:
        case "ttft":
            return [o.ttft for o in done if o.ttft is not None]
        case "tpot":
            return [tpot for o in done if (tpot := o.tpot) is not None]
        case "itl":
            return [gap for o in done for gap in o.itls]
    return [o.latency for o in done]


def statistics(metric: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in ms, under vLLM's keys; percentiles interpolate linearly."""
    ms = np.asarray(seconds or [0.0], dtype=np.float64) * 1000
    out = {
        f"mean_{metric}_ms": float(ms.mean()),
        f"median_{metric}_ms": float(np.median(ms)),
        f"std_{metric}_ms": float(ms.std()),
    }
    return out | {f"p{word(p)}_{metric}_ms": float(np.percentile(ms, p)) for p in percentiles}


def word(percentile: float) -> str:
    """99 for 99.0, 99.9 as it is."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def meets(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    """Whether a request met every objective (ms). What it does not have (one token: no TPOT) it does not miss."""
    has = {"ttft": outcome.ttft or 0.0, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(has[name] * 1000 <= limit for name, limit in goodput.items())


def peak_tokens(done: Sequence[Outcome]) -> float:
    """Most tokens that arrived in one second of the run, in whole seconds from the first request on."""
    if not any(o.ttft is not None for o in done):
        return 0.0
    begin = min(o.start for o in done)
    seconds: dict[int, float] = {}
    for outcome in done:
        if outcome.ttft is None:
            continue
        share = outcome.output_len / (1 + len(outcome.itls))  # an arrival may bring several tokens
        at = outcome.start + outcome.ttft - begin
        for gap in (0.0, *outcome.itls):
            at += gap
            seconds[int(at)] = seconds.get(int(at), 0.0) + share
    return max(seconds.values())


def peak_concurrency(done: Sequence[Outcome]) -> int:
    """Most requests that were under way at one moment."""
    events = sorted([(o.start, 1) for o in done] + [(o.start + o.latency, -1) for o in done])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


# ---------------------------------------------------------------- what the user asks for


def metrics_from(words: str) -> list[str]:
    """ "ttft,tpot" as a list. Raises ConfigError."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ConfigError("--percentile-metrics", name, f"is no metric; {nearest(name, METRICS)}")
    return names


def percentiles_from(words: str) -> list[float]:
    """ "50,99.9" as numbers. Raises ConfigError."""
    out = []
    for part in words.split(","):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise ConfigError("--metric-percentiles", part, "use numbers from 0 to 100, as 50,90,99")
        out.append(value)
    return out


def goodput_from(words: Sequence[str]) -> dict[str, float]:
    """ "ttft:200 tpot:50" as limits in ms. Raises ConfigError."""
    out = {}
    for pair in words:
        name, _, value = pair.partition(":")
        if name not in OBJECTIVES:
            raise ConfigError("--goodput", pair, f"use metric:ms, as ttft:200; {nearest(name, OBJECTIVES)}")
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = -1.0
        if not out[name] >= 0:
            raise ConfigError("--goodput", pair, "use a number of ms, 0 or more, as ttft:200")
    return out
