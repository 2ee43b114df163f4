"""Shows on a terminal how far a rank is with loading its layers, and what it took. Knows tensors by name only."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nonet.weights.loader import Checkpoint

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class LoadingBar:
    """A bar of layers, for a Checkpoint to `watch`; then a line with bytes, seconds and host memory.

    On standard error, only if `wanted` and only on a terminal. One rank shows it for all: ranks load alike.
    """

    def __init__(self, num_layers: int, *, wanted: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        shown = wanted and (console is not None or sys.stderr.isatty())
        columns = (TextColumn("loading"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, disable=not shown, transient=True)
        self._task = self._bar.add_task("", total=num_layers)
        self._shown, self._started = shown, time.monotonic()

    def __call__(self, name: str) -> None:
        """A tensor is about to be read: the layers before its own are done."""
        found = _LAYER.search(name)
        if found and int(found[1]) > self._bar.tasks[0].completed:
            self._bar.update(self._task, completed=int(found[1]))

    def done(self, checkpoint: Checkpoint) -> None:
        """All is loaded: say what it took."""
        self._bar.stop()
        if self._shown:
            seconds = time.monotonic() - self._started
            read, staged = (f"{count / 2**20:,.1f} MiB" for count in (checkpoint.bytes_read, checkpoint.staged))
            self._console.print(
                f"read {read} of {checkpoint.folder} in {seconds:.1f} s, at most {staged} on its way in host memory",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def __enter__(self) -> LoadingBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
