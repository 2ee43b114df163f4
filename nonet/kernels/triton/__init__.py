"""Triton kernels: for GPUs, and in Triton's interpreter for CPUs, where tests run them. Imported lazily.

Each is specified by plain PyTorch where it is used. None reads anything on the host, so all can be captured in graphs.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # there bfloat16 products are silently wrong: widen them first
