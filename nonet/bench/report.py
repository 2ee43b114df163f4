"""Results as the lines that users of vLLM's benchmarks know, and as files. Used by `nonet bench`; prints nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nonet.bench.latency import LatencyRun
from nonet.bench.metrics import METRICS, percentiles_from, word
from nonet.bench.options import ServeOptions
from nonet.bench.throughput import ThroughputRun
from nonet.errors import ConfigError

_WIDTH = 50
_TOTALS = (
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)


def serve_lines(result: Mapping[str, Any], options: ServeOptions, metrics: Sequence[str]) -> list[str]:
    """The table of `bench serve`."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [_line("Successful requests:", result["completed"]), _line("Failed requests:", result["failed"])]
    if options.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", options.max_concurrency))
    if result["request_rate"] != "inf":
        lines.append(_line("Request rate configured (RPS):", result["request_rate"]))
    lines += [_line(label, result[key]) for label, key in _TOTALS if result[key] is not None]
    for metric in metrics if result["completed"] else ():  # zeros would read like times
        short, title = METRICS[metric]
        lines.append(f"{title:-^{_WIDTH}}")
        lines.append(_line(f"Mean {short} (ms):", result[f"mean_{metric}_ms"]))
        lines.append(_line(f"Median {short} (ms):", result[f"median_{metric}_ms"]))
        for p in percentiles_from(options.metric_percentiles):
            lines.append(_line(f"P{word(p)} {short} (ms):", result[f"p{word(p)}_{metric}_ms"]))
    return [*lines, "=" * _WIDTH]


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def throughput_lines(run: ThroughputRun) -> list[str]:
    result = run.result
    requests, total, output = (
        result[key] for key in ("requests_per_second", "tokens_per_second", "output_tokens_per_second")
    )
    lines = [
        f"Throughput: {requests:.2f} requests/s, {total:.2f} total tokens/s, {output:.2f} output tokens/s",
        f"Total num prompt tokens:  {run.prompt_tokens}",
        f"Total num output tokens:  {run.output_tokens}",
    ]
    return [*lines, f"Failed requests:  {run.failed}"] if run.failed else lines


def latency_lines(run: LatencyRun) -> list[str]:
    result = run.result
    lines = [f"Avg latency: {result['avg_latency']} seconds"]
    return lines + [f"{p}% percentile latency: {seconds} seconds" for p, seconds in run.percentiles.items()]


# ---------------------------------------------------------------- files


def check_writable(flag: str, path: Path | None) -> None:
    """Raise ConfigError for a file that cannot be written: before the run, not after it."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise ConfigError(flag, str(path), "is a folder; give a file")
    if not folder.is_dir():
        raise ConfigError(flag, str(path), f"there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(flag, str(path), "cannot be written: no permission")


def write_json(flag: str, path: Path, data: Mapping[str, Any], *, append: bool = False) -> None:
    """One JSON mapping, as the file or as one more line of it. Raises ConfigError."""
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=None if append else 1) + "\n")
    except OSError as error:
        raise ConfigError(flag, str(path), f"cannot be written: {error.strerror}") from error
