"""Fused small operations on CPUs, compiled by Numba: what PyTorch does in many calls over few rows, in one.

Each has a plain PyTorch form where it is used (`layers`, `moe`), which is its specification and the path on GPUs.
Tensors pass as NumPy views; bfloat16 as the 16 bits it is. Everything is summed in float32 and rounded once.
Compiled for both types when first imported, and kept on disk from then on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nonet.compiled import drop_stale

drop_stale(Path(__file__).parent)


def handles(x: Tensor) -> bool:
    """Whether these kernels take x: on the CPU, in float32 or bfloat16."""
    return x.device.type == "cpu" and (x.dtype == torch.bfloat16 or x.dtype == torch.float32)


def view(x: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as NumPy sees it."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    return x.numpy()
