"""How the planner's inner loops are compiled: cached on disk, and the same result on every machine.

Without fastmath: every rank may plan for itself, so sums keep their order and no multiplication is fused with an
addition. A cached function does not see that a function of another file which it calls has changed, so
what is older than any file here is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

from nonet.compiled import drop_stale

drop_stale(Path(__file__).parent, Path(__file__).parent.parent)

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile at the first call, or read what an earlier process compiled. Releases the interpreter lock."""
    options: dict[str, Any] = dict(nogil=True, boundscheck=False, error_model="numpy")
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        remedy = "set NUMBA_CACHE_DIR to a folder that can be written"
        warnings.warn(f"the planner is compiled again in each process: {remedy}", stacklevel=2)
        compiled = njit(**options)(function)
    return compiled
