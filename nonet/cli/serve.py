"""`nonet serve`: reads the command line, and starts the server or shows what it would start. Knows no tensors."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from nonet import __version__
from nonet.config.checkpoint import read_spec
from nonet.config.dialects import Given, Said, read_said
from nonet.config.resolve import settle
from nonet.config.schema import Section
from nonet.errors import NonetError

_HIDDEN = ("server.api_key",)


def run(said: Sequence[Said], *, print_config: bool) -> int:
    """Serve until told to stop: the exit code. With `print_config` print what would run instead; nothing is started."""
    given = read_said(said)
    if print_config:
        typer.echo(resolved_text(given), nl=False)
        return 0
    for note in given.notes:
        typer.echo(f"note: {note}", err=True)
    try:
        from nonet.server.processes import serve

        return serve(given.config)
    except ModuleNotFoundError as error:
        if (error.name or "nonet").startswith("nonet"):
            raise
        raise NonetError(f"the server needs {error.name}, which is missing: pip install 'nonet[server]'") from error


def resolved_text(given: Given) -> str:
    """The resolved tree as YAML; behind each value stands where it came from. Raises ConfigError or ModelError.

    Needs no GPUs: where they are asked for, or some are there, it is resolved as if there were enough.
    """
    asked = given.config
    gpus = asked.parallel.device == "cuda" or (asked.parallel.device == "auto" and glob.glob("/dev/nvidia[0-9]*"))
    spec = read_spec(asked.model.model)
    resolved, notes = settle(asked, spec, num_gpus=asked.world_size if gpus else 0)
    ranks = resolved.world_size
    lines = [f"# nonet {__version__}: {ranks} rank{'s' * (ranks > 1)}"]
    lines += [f"# note: {note}" for note in (*given.notes, *notes)]
    return "\n".join([*lines, *_lines(resolved, asked, given.origin)]) + "\n"


def _lines(settled: Section, asked: Section, origin: dict[str, str], prefix: str = "") -> Iterator[str]:
    pad = "  " * prefix.count(".")
    rows: list[tuple[str, str]] = []
    for name in type(settled).model_fields:
        value, before = getattr(settled, name), getattr(asked, name)
        if isinstance(value, Section):
            yield from _aligned(rows, pad)
            rows = []
            yield f"{pad}{name}:"
            yield from _lines(value, before, origin, f"{prefix}{name}.")
        else:
            rows.append(_row(name, f"{prefix}{name}", value, before, origin))
    yield from _aligned(rows, pad)


def _row(name: str, dotted: str, value: Any, before: Any, origin: dict[str, str]) -> tuple[str, str]:
    """("name: value", where it came from). Values are JSON, which is YAML."""
    if dotted in _HIDDEN and value is not None:
        return f"{name}: {json.dumps(['***'] * len(value))}", f"{origin[dotted]}, hidden"
    comment = origin[dotted]
    if value != before:
        comment += f" ({json.dumps(before)}), resolved" if before is not None else ", resolved"
    return f"{name}: {json.dumps(value)}", comment


def _aligned(rows: list[tuple[str, str]], pad: str) -> Iterator[str]:
    """Comments of a section stand below each other, but for those behind very long values."""
    width = max((len(text) for text, _ in rows if len(text) <= 60), default=0)
    for text, comment in rows:
        yield f"{pad}{text:<{width}}  # {' '.join(comment.split())}"
