"""When each request of a run is due. Pure arithmetic on a seed."""

from __future__ import annotations

import math

import numpy as np

from nonet.bench.options import TrafficOptions
from nonet.errors import ConfigError


def arrivals(count: int, traffic: TrafficOptions, seed: int) -> list[float]:
    """Seconds from the start at which requests 0 to count - 1 are due, never decreasing.

    Gaps are gamma-distributed with mean 1 / rate (burstiness 1: exponential, that is a Poisson process) and scaled as
    a whole, so that a run takes what its rate says: the last request is due at the sum of the means.
    """
    check(traffic)
    rates = [_rate(i / count, traffic) for i in range(count)]
    if math.isinf(traffic.request_rate) and traffic.ramp_up_strategy is None:
        return [0.0] * count
    means = np.array([1.0 / rate for rate in rates])
    shape = traffic.burstiness
    gaps = np.random.default_rng(seed).gamma(shape, means / shape)
    due = np.cumsum(gaps)
    return [float(t) for t in due * (means.sum() / due[-1])] if due[-1] > 0 else [0.0] * count


def check(traffic: TrafficOptions) -> None:
    """Raises ConfigError for traffic options that contradict each other."""
    start, end = traffic.ramp_up_start_rps, traffic.ramp_up_end_rps
    if traffic.ramp_up_strategy is None:
        if start is not None or end is not None:
            raise ConfigError("--ramp-up-strategy", None, "the ramp's rates need it: linear or exponential")
        return
    if not math.isinf(traffic.request_rate):
        raise ConfigError("--request-rate", traffic.request_rate, "the ramp sets the rate; leave one of the two out")
    if start is None or end is None:
        raise ConfigError("--ramp-up-strategy", traffic.ramp_up_strategy, "needs --ramp-up-start-rps and -end-rps")
    if start <= 0:
        raise ConfigError("--ramp-up-start-rps", start, "use a rate above 0")
    if start > end:
        raise ConfigError("--ramp-up-start-rps", start, f"use at most --ramp-up-end-rps ({end})")


def _rate(progress: float, traffic: TrafficOptions) -> float:
    """Requests a second after that part (0 to 1) of the requests."""
    start, end = traffic.ramp_up_start_rps or 0.0, traffic.ramp_up_end_rps or 0.0
    if traffic.ramp_up_strategy == "linear":
        return start + (end - start) * progress
    if traffic.ramp_up_strategy == "exponential":
        return start * (end / start) ** progress
    return traffic.request_rate
