"""Triton kernels: for GPUs, and in Triton's interpreter for CPUs, where tests run them. Imported lazily.

Each is specified by plain PyTorch where it is used. None reads anything on the host, so all can be captured in graphs.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # comes with PyTorch for GPUs, mostly
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # there bfloat16 products are silently wrong: widen them first

_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)


def handles(x: Tensor) -> bool:
    """Whether these kernels take x: on a GPU, of a type they read, and with Triton there to compile them."""
    return x.is_cuda and HAS_TRITON and x.dtype in _TYPES


@cache
def overlapping(device: torch.device) -> dict[str, bool]:
    """Options of a launch that begins while the kernel before it on the stream ends, where GPUs can (Hopper and later).

    The kernel's first act, under its constant PDL, is to `gdc_wait` for what that one writes. It calls no
    `gdc_launch_dependents`: the next kernel begins once its programs end. (CUDA: programmatic dependent launch.)
    """
    can = not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}
