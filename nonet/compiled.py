"""Keeps Numba's caches true: a compiled function is kept by its own file's time, and sees no change in what it calls.

Called by the packages that have compiled loops, before they compile or read any. Knows no loops.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def drop_stale(*folders: Path) -> None:
    """Remove what was compiled, beside these folders' sources, before any of them last changed."""
    sources = [source.stat().st_mtime for folder in folders for source in folder.glob("*.py")]
    for folder in folders:
        for index in (folder / "__pycache__").glob("*.nbi"):
            with contextlib.suppress(OSError):  # somebody else's, or just removed by another process
                if index.stat().st_mtime < max(sources):
                    index.unlink()
