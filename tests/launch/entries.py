"""What the ranks of `test_local` do. Imported by the supervisor, so it stays light."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nonet.config.place import Place


def rest(place: Place, payload: dict[str, Any]) -> None:
    time.sleep(600)


def deaf(place: Place, payload: dict[str, Any]) -> None:
    """Deaf to every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


def leave(place: Place, payload: dict[str, Any]) -> None:
    """Say where this rank stands, in a file and on standard output, and end well."""
    print("this must not reach the events", place.rank, flush=True)
    said = {**dataclasses.asdict(place), "stdin": sys.stdin.read(), "word": os.environ.get("NONET_WORD")}
    Path(payload["folder"], f"{place.rank}.json").write_text(json.dumps(said))


def end(place: Place, payload: dict[str, Any]) -> None:
    """The chosen rank ends in the chosen way, the others rest."""
    if place.rank != payload["rank"]:
        rest(place, payload)
    if payload["how"] == "raise":
        raise ValueError("on purpose")
    if payload["how"] == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.Signals[payload["how"]])
