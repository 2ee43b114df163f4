"""`nonet quantize`: a checkpoint's experts and linear layers to FP8, with a bar while it runs on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nonet.weights.quantize import quantize_folder


def run(source: str, target: Path, max_shard_bytes: int) -> None:
    """Raises ConfigError or ModelError."""
    columns = (TextColumn("quantize"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        done = quantize_folder(
            source,
            target,
            shard_bytes=max_shard_bytes,
            progress=lambda read, total: bar.update(task, completed=read, total=total),
        )
    files = f"{done.files} file{'s' * (done.files > 1)}"
    typer.echo(f"{target}: {done.quantized} of {done.quantized + done.kept} tensors in FP8, {files}")
    typer.echo(f"{_size(done.bytes_before)} -> {_size(done.bytes_after)}; largest piece read {_size(done.piece_bytes)}")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"
