"""Triton kernels: for GPUs, and in Triton's interpreter for CPUs, where tests run them. Imported lazily.

Each is specified by plain PyTorch where it is used. None reads anything on the host, so all can be captured in graphs.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # comes with PyTorch for GPUs, mostly
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # there bfloat16 products are silently wrong: widen them first

_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)


def handles(x: Tensor) -> bool:
    """Whether these kernels take x: on a GPU, of a type they read, and with Triton there to compile them."""
    return x.is_cuda and HAS_TRITON and x.dtype in _TYPES
