"""What the `nonet eplb` commands read and write: statistics in every form, and files that may not be there.

Apart from the planner's own readers because some dumps need torch. Used by `eplb` and `eplb_simulate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nonet.eplb.statistics import FIELD, Statistics, from_logical_count, read_statistics
from nonet.errors import ConfigError


def load_statistics(
    path: str | Path,
    start: int | None = None,
    stop: int | None = None,
    *,
    slot_map: Mapping[int, Sequence[int]] | None = None,
) -> Statistics:
    """As `read_statistics`, and SGLang's .pt too. Raises ConfigError."""
    path = Path(path)
    if path.suffix not in (".pt", ".pth") or not path.is_file():
        return read_statistics(path, start, stop, slot_map=slot_map)
    import pickle

    import torch

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(FIELD, str(path), f"is no dump of tensors that can be read: {reason}") from error
    count = dump.get("logical_count") if isinstance(dump, dict) else dump
    if not isinstance(count, torch.Tensor):
        raise ConfigError(FIELD, str(path), "holds no logical_count; record with the mode stat")
    return from_logical_count(count.numpy(), str(path)).between(start, stop)


def write_text(path: Path, text: str, field: str) -> None:
    """Raises ConfigError naming `field`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be written: {error.strerror}") from error
