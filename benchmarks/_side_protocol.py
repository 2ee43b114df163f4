"""The worker's end of a benchmark's A/B comparison: JSON lines in on stdin, JSON lines out on stdout.

Used by the `_side_*.py` workers, each in its own engine's environment: nothing but the standard library here.
A worker keeps its engine up between orders, so that runs of two engines can alternate while both are warm.

    -> {"prompts": [[5, 9, ...], ...], "max_tokens": 64}
    <- {"seconds": 0.3, "output_tokens": 64, "first": [17]}
    -> {"close": true}, or end of file: the worker ends its engine and exits
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

Generate = Callable[[list[list[int]], int], list[list[int]]]


class Engine:
    """What a worker hands to `serve`: how to generate, how to end, and facts to put into the report."""

    def __init__(self, generate: Generate, close: Callable[[], None], about: dict[str, Any]) -> None:
        self.generate, self.close, self.about = generate, close, about


def private_pipes() -> tuple[TextIO, TextIO]:
    """Takes stdin and stdout for the protocol; what else is printed, here or in a child, goes to stderr."""
    orders, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return orders, replies


def timed_run(engine: Engine, order: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    tokens = engine.generate(order["prompts"], order["max_tokens"])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "output_tokens": sum(map(len, tokens)), "first": [t[0] for t in tokens]}


def serve(start: Callable[[dict[str, Any]], Engine]) -> None:
    """Starts the engine with the options in the first argument (JSON), then obeys until told to close."""
    orders, replies = private_pipes()

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        began = time.perf_counter()
        engine = start(json.loads(sys.argv[1]))
        reply({"ready": {**engine.about, "start_s": round(time.perf_counter() - began, 1)}})
        try:
            for line in orders:
                order = json.loads(line)
                if order.get("close"):
                    break
                reply(timed_run(engine, order))
        finally:
            engine.close()
    except Exception as e:  # noqa: BLE001 - the parent prints this line, and the end of our stderr below it
        traceback.print_exc()
        reply({"error": f"{type(e).__name__}: {e}"[:500]})
        sys.exit(1)
