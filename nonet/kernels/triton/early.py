"""Kernels that start while the one before them ends (programmatic dependent launch, from Hopper on).

In a chain of short kernels that hides most of a launch. Used by those that stand in such chains.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nonet.kernels.triton import INTERPRETED


@cache
def _starts_early(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def early(device: torch.device) -> dict[str, bool]:
    """Launch options: from Hopper on a kernel may start while the one before it ends, and waits for it itself."""
    return {"EARLY": True, "launch_pdl": True} if _starts_early(device) else {"EARLY": False}


@triton.jit
def wait_for_the_kernel_before(EARLY: tl.constexpr):
    """Nothing it wrote may be read before, and nothing written; what was written still earlier may be read.

    Every kernel that starts early must come here, also one that reads nothing, so that the next can rely on it.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
