"""Tiles that were measured: one JSON file a device, made by tools/tune_experts.py; without one a rule chooses.

Read by `moe.experts.triton` when it meets its first layer, never written while serving. A file holds layers (slots,
hidden and intermediate width, dtype of the weights), each with buckets: the fastest tiles at so many pairs a slot.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from nonet.kernels.triton.tiling import Tile

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Bucket:
    """The tiles of both products, the fastest at so many pairs a slot. Pairs are counted as the kernels' callers do:
    all that could be, wherever their slots are."""

    pairs_a_slot: float
    gate_up: Tile
    down: Tile


@dataclass(frozen=True, slots=True)
class Layer:
    """What a table knows of experts of one shape. dtype: "bfloat16" or "float8_e4m3fn"."""

    slots: int
    hidden: int
    intermediate: int
    dtype: str
    buckets: tuple[Bucket, ...]

    def nearest(self, pairs_a_slot: float) -> Bucket:
        """By ratio: 30 is nearer to 40 than to 20."""
        return min(self.buckets, key=lambda bucket: _far(bucket.pairs_a_slot, pairs_a_slot))


def path(device: str, folder: Path = FOLDER) -> Path:
    """The file of a device as `torch.cuda.get_device_name` calls it."""
    return folder / f"{device.replace(' ', '_').replace('/', '_')}.json"


def load(device: str, folder: Path = FOLDER) -> tuple[Layer, ...]:
    """All layers tuned on a device; none where it has no file."""
    file = path(device, folder)
    if not file.exists():
        return ()
    return tuple(
        Layer(
            slots=layer["slots"],
            hidden=layer["hidden"],
            intermediate=layer["intermediate"],
            dtype=layer["dtype"],
            buckets=tuple(
                Bucket(bucket["pairs_a_slot"], Tile(*bucket["gate_up"]), Tile(*bucket["down"]))
                for bucket in layer["buckets"]
            ),
        )
        for layer in json.loads(file.read_text())["layers"]
    )


def find(layers: tuple[Layer, ...], slots: int, hidden: int, intermediate: int, dtype: str) -> Layer | None:
    """The layer of this shape and dtype; of several, that with the nearest number of slots."""
    same = [own for own in layers if (own.hidden, own.intermediate, own.dtype) == (hidden, intermediate, dtype)]
    return min(same, key=lambda own: _far(own.slots, slots), default=None)


def _far(a: float, b: float) -> float:
    return abs(math.log(max(a, 1e-6) / max(b, 1e-6)))
