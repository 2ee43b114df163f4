"""What the demo shows: text as it streams, and the closing tables. On a terminal it is redrawn, else plain lines.

Used by `cli.demo` only. Legend: L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nonet.eplb.load import imbalance
from nonet.types import RequestOutput

LINE_CHARACTERS = 72  # of streamed text in one plain line
REDRAWS_PER_S = 8


class View(Protocol):
    """Shows the requests of one kind of text while they run, inside a `with` block."""

    def update(self, row: int, output: RequestOutput) -> None:
        """Request `row` has grown."""
        ...

    def __enter__(self) -> View: ...

    def __exit__(self, *exc: object) -> None: ...


def view_of(console: Console, kind: str, prompts: Sequence[str]) -> View:
    return TerminalView(console, kind, prompts) if console.is_terminal else PlainView(console, kind, prompts)


class TerminalView:
    """A table with a row a request, redrawn as text arrives."""

    def __init__(self, console: Console, kind: str, prompts: Sequence[str]) -> None:
        self._kind, self._prompts = kind, prompts
        self._outputs: list[RequestOutput | None] = [None] * len(prompts)
        self._console = console
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=REDRAWS_PER_S)

    def _table(self) -> Table:
        table = Table(title=self._kind, title_justify="left", title_style="bold", box=None, show_header=False)
        for prompt, output in zip(self._prompts, self._outputs, strict=True):
            text = Text(printable(prompt), style="dim")
            if output is not None:
                text.append(printable(output.outputs[0].text), style="not dim green")
            table.add_row(f"rank {output.dp_rank}" if output is not None else "", text)
        return table

    def update(self, row: int, output: RequestOutput) -> None:
        self._outputs[row] = output

    def __enter__(self) -> TerminalView:
        self._console.print()
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)


class PlainView:
    """Lines in the order in which text arrives, each with its rank and request; `>` marks the prompt."""

    def __init__(self, console: Console, kind: str, prompts: Sequence[str]) -> None:
        self._console, self._kind, self._prompts = console, kind, prompts
        self._shown = [-1] * len(prompts)  # characters; -1: not even the prompt

    def update(self, row: int, output: RequestOutput) -> None:
        text = output.outputs[0].text
        if self._shown[row] < 0:
            self._print(output, ">", self._prompts[row])
            self._shown[row] = 0
        while len(text) - self._shown[row] >= LINE_CHARACTERS:
            self._line(row, output, self._shown[row] + LINE_CHARACTERS)
        if output.finished:
            self._line(row, output, len(text))

    def _line(self, row: int, output: RequestOutput, end: int) -> None:
        part = output.outputs[0].text[self._shown[row] : end]
        self._shown[row] = end
        if part:
            self._print(output, " ", part)

    def _print(self, output: RequestOutput, mark: str, text: str) -> None:
        number = output.request_id.rpartition("-")[2]
        self._console.print(f"  rank {output.dp_rank} #{number} {mark} {printable(text)}", markup=False, soft_wrap=True)

    def __enter__(self) -> PlainView:
        self._console.print(f"\n{self._kind}", markup=False)
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def printable(text: str) -> str:
    """On one line, and without what could steer a terminal."""
    return "".join(c if c.isprintable() else "\u21b5" if c == "\n" else " " for c in text)


def rank_table(tokens: Sequence[int], requests: Sequence[int], pairs_R: npt.NDArray[np.float64]) -> Table:
    """What each rank did for its own requests, and what its experts did for everyone's."""
    table = Table(title="Tokens by rank", title_justify="left", box=SIMPLE)
    for name in ("rank", "requests", "tokens run", "(token, expert) pairs computed", "share"):
        table.add_column(name, justify="right")
    for rank, (own, count, pairs) in enumerate(zip(tokens, requests, pairs_R, strict=True)):
        table.add_row(f"{rank}", f"{count}", f"{own}", f"{pairs:.0f}", f"{pairs / pairs_R.sum():.1%}")
    return table


def imbalance_table(pairs: dict[str, npt.NDArray[np.float64]]) -> Table:
    """Imbalance of the expert load over the ranks, by kind of text, from [L, R] pairs of each kind."""
    table = Table(
        title="Imbalance of expert load by kind of text: (max - mean) / mean over ranks",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("kind")
    for name in ("mean of layers", "worst layer", "share of each rank"):
        table.add_column(name, justify="right")
    for kind, pairs_LR in pairs.items():
        by_layer = imbalance(pairs_LR)
        share = pairs_LR.sum(axis=0) / pairs_LR.sum()
        row = (f"{by_layer.mean():.2f}", f"{by_layer.max():.2f}", " ".join(f"{part:.0%}" for part in share))
        table.add_row(kind, *row, end_section=kind == list(pairs)[-2])
    return table
