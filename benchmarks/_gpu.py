"""For benchmarks of GPUs: none of them says anything without one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def need_gpus(count: int = 1) -> None:
    """Ends the program with one line where there are fewer."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        sys.exit(f"{Path(sys.argv[0]).name}: needs {count} GPU{'s' if count > 1 else ''}, found {found}")
