"""The progress bar of a benchmark: finished and failed requests, on a terminal only."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Use in a `with` block; `step()` for each request (or batch) that is done."""

    def __init__(self, what: str, total: int, wanted: bool = True) -> None:
        self._bar: Any = None
        self._failed = 0
        if wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            failed = TextColumn("[red]{task.fields[failed]}")
            self._bar = Bar(*columns, failed, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total, failed="")

    def step(self, failed: bool = False) -> None:
        self._failed += failed
        if self._bar:
            self._bar.update(self._task, advance=1, failed=f"{self._failed} failed" if self._failed else "")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()
