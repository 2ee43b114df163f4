"""Counters of requests and tokens, kept as one row of doubles a server process; `metrics_page` shows them.

Used by `job`, which tells a `Watch` what comes. Rows can be added up: with several server processes, whichever is
asked shows the sum of all (`peers` brings the others' rows). No global state, nothing here waits.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence

REASONS = ("stop", "length", "abort", "error")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = tuple(float(a * 10**b) for b in range(6) for a in (1, 2, 5))
COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens of requests that brought a first token.",
    "vllm:generation_tokens": "Tokens generated.",
    "nonet:requests": "Requests taken in; one may hold several prompts.",
}
ENDED = "vllm:request_success"
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": (_SECONDS, "From a request's arrival to its first token."),
    "vllm:inter_token_latency_seconds": (_SECONDS, "Time between tokens of a sequence, as they are delivered."),
    "vllm:request_time_per_output_token_seconds": (_SECONDS, "A sequence's mean time of a token after the first."),
    "vllm:e2e_request_latency_seconds": (_LONG, "From a request's arrival to its end."),
    "vllm:request_prompt_tokens": (_TOKENS, "Prompt tokens of a request."),
    "vllm:request_generation_tokens": (_TOKENS, "Tokens of a sequence."),
}


def _layout() -> tuple[dict[str, int], int]:
    """Where each number stands in a row; a histogram has its buckets, the one above them, and the sum."""
    single = [*COUNTERS, *(f"{ENDED}/{reason}" for reason in REASONS)]
    places = {name: i for i, name in enumerate(single)}
    size = len(places)
    for name, (bounds, _) in HISTOGRAMS.items():
        places[name] = size
        size += len(bounds) + 2
    return places, size


PLACES, _SIZE = _layout()


class Metrics:
    """One process's row."""

    def __init__(self) -> None:
        self._row = array("d", bytes(8 * _SIZE))

    def count(self, name: str, amount: float = 1.0) -> None:
        self._row[PLACES[name]] += amount

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """`times` observations of the same value."""
        bounds = HISTOGRAMS[name][0]
        place = PLACES[name]
        self._row[place + bisect_left(bounds, value)] += times
        self._row[place + len(bounds) + 1] += value * times

    def row(self) -> bytes:
        return self._row.tobytes()

    def summed(self, others: Sequence[bytes]) -> list[float]:
        """This row and others, added up."""
        total = list(self._row)
        for other in others:
            total = [a + b for a, b in zip(total, array("d", other), strict=True)]
        return total

    def watch(self, prompt_tokens: int, sequences: int) -> Watch:
        """For one request that has just been taken in."""
        return Watch(self, prompt_tokens, sequences)


class Watch:
    """What one request's tokens mean for the counters."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, sequences: int) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._began = time.perf_counter()
        self._first = [0.0] * sequences  # when a sequence's first and latest tokens came, and how many
        self._latest = [0.0] * sequences
        self._tokens = [0] * sequences
        self._open = set(range(sequences))
        self._heard = False
        metrics.count("nonet:requests")

    def came(self, sequence: int, tokens: int, reason: str | None, now: float) -> None:
        """So many tokens, and why the sequence ended if it did."""
        metrics = self._metrics
        if tokens:
            metrics.count("vllm:generation_tokens", tokens)
            if not self._heard:
                self._heard = True
                metrics.count("vllm:prompt_tokens", self._prompt_tokens)
                metrics.observe("vllm:request_prompt_tokens", self._prompt_tokens)
                metrics.observe("vllm:time_to_first_token_seconds", now - self._began)
            if self._tokens[sequence]:
                metrics.observe("vllm:inter_token_latency_seconds", (now - self._latest[sequence]) / tokens, tokens)
            else:
                self._first[sequence] = now
            self._latest[sequence] = now
            self._tokens[sequence] += tokens
        if reason is not None:
            self._end(sequence, reason)

    def _end(self, sequence: int, reason: str) -> None:
        metrics, tokens = self._metrics, self._tokens[sequence]
        self._open.discard(sequence)
        metrics.count(f"{ENDED}/{reason}")
        metrics.observe("vllm:request_generation_tokens", tokens)
        if tokens > 1:
            mean = (self._latest[sequence] - self._first[sequence]) / (tokens - 1)
            metrics.observe("vllm:request_time_per_output_token_seconds", mean)

    def close(self, error: BaseException | None) -> None:
        """The request is over; what had not ended was aborted, or failed with an error."""
        for sequence in list(self._open):
            self._end(sequence, "abort" if error is None else "error")
        self._metrics.observe("vllm:e2e_request_latency_seconds", time.perf_counter() - self._began)
