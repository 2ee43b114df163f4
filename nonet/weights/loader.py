"""Reads single tensors, or slices of them, out of a Hugging Face folder of safetensors files.

Models ask for what they need by name, so a rank reads its own tensors only, and files that hold none of them may be
absent. Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nonet.errors import ModelError

Range = tuple[int, int]
_FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors names them; others are no plain weights: quantized, mostly


class Checkpoint:
    """The tensors of a folder by name. `bytes_read` counts what was read. Close it when loading is done."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): str(file) for name, file in file_of.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is not a safetensors index: {error!r}") from error
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json")
        return dict.fromkeys(self._file(single.name).keys(), single.name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise ModelError(f"{path} is missing, and this rank needs tensors from it")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read (truncated?): {error}") from error
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> Tensor:
        """A tensor, or part of it, in the model's dtype on the rank's device. Raises ModelError if it is not there."""
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: tensor {name!r} is missing")
        file = self._file_of[name]
        try:
            part = self._file(file).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / file}: tensor {name!r} is missing, though the index names it") from error
        if part.get_dtype() not in _FLOATS:
            what = f"tensor {name!r} has dtype {part.get_dtype()}, which is not supported"
            raise ModelError(f"{self.folder / file}: {what}; supported: {', '.join(_FLOATS)}")
        shape = part.get_shape()
        for axis, span in enumerate((rows, columns)):
            if span is not None and (axis >= len(shape) or span[1] > shape[axis]):
                raise ModelError(f"{self.folder}: tensor {name!r} has shape {shape}, too small for its config.json")
        if columns is not None:
            r0, r1 = rows or (0, shape[0])
            tensor = part[r0:r1, columns[0] : columns[1]]
        elif rows is not None:
            tensor = part[rows[0] : rows[1]]
        else:
            tensor = part[:]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def expect(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor whose shape must be as the config says. Raises ModelError."""
        tensor = self.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self.folder}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def close(self) -> None:
        self._open.clear()
