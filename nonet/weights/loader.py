"""Reads single tensors, or parts of them, out of a Hugging Face folder of safetensors files.

Models ask for what they need by name, so a rank reads its own tensors only, and files that hold none of them may be
absent. What is on its way through host memory is bounded: large tensors come in pieces. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nonet.config.checkpoint import fp8_block, read_json
from nonet.errors import ModelError
from nonet.kernels.fp8 import blocks_of, dequantize

Range = tuple[int, int]
PIECE_BYTES = 64 << 20  # most that is read at a time, unless one row is longer
SCALE = "_scale_inv"  # behind a weight's name: its factors; DeepSeek's name for what weights are multiplied by
FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors names them; others are no plain weights: quantized, mostly
FP8_NAME = "F8_E4M3"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, FP8_NAME: 1}


class Checkpoint:
    """The tensors of a folder by name. Close it when loading is done.

    `bytes_read` counts what was read, `staged` is the most that one piece took on its way. `watch` is told the name
    of each tensor before it is read.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, watch: Callable[[str], None] | None = None
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.bytes_read = self.staged = 0
        self._watch = watch
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

    def stored(self, name: str) -> Any:
        """What safetensors has of a tensor before it is read. Raises ModelError if it is not there."""
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: tensor {name!r} is missing")
        file = self._file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / file}: tensor {name!r} is missing, though the index names it") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored. Raises ModelError if the tensor is not there."""
        return tuple(self.stored(name).get_shape())

    def is_fp8(self, name: str) -> bool:
        """Whether it is a weight in FP8 with factors beside it. Raises ModelError if the tensor is not there."""
        return self.stored(name).get_dtype() == FP8_NAME and name + SCALE in self

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(
        self,
        name: str,
        rows: Range | None = None,
        columns: Range | None = None,
        *,
        index: int | None = None,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A tensor, or part of it, in the model's (or the given) dtype on the rank's device; FP8 is dequantized.

        `index` picks one of the first dimension; rows and columns are those of what is left, as stored. It comes
        transposed if asked, and into `out` if that is given. Raises ModelError if it is not there or too small.
        """
        spans = self._spans(name, rows, columns, index)
        shape = [b - a for a, b in spans]
        if out is None:
            out = torch.empty(shape[::-1] if transposed else shape, dtype=dtype or self.dtype, device=self.device)
        target = out.t() if transposed else out
        scale_nk = self._scale(name, spans) if self.is_fp8(name) else None
        for start, piece in self._pieces(name, spans, index):
            to = target[start : start + len(piece)]
            if scale_nk is None:
                to.copy_(piece)
            else:
                block, row = self.fp8_block or 0, spans[0][0] + start
                own_nk = scale_nk[row // block - spans[0][0] // block :]
                dequantize(piece, own_nk, block, out.dtype, first=(row % block, spans[1][0] % block), out=to)
        return out

    def read_fp8(
        self, name: str, rows: Range | None = None, columns: Range | None = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(weight in FP8, float32 factors of the blocks that the part touches): as stored, for `is_fp8(name)`."""
        spans = self._spans(name, rows, columns, None)
        if out is None:
            out = torch.empty([b - a for a, b in spans], dtype=torch.float8_e4m3fn, device=self.device)
        scale_nk = self._scale(name, spans)
        for start, piece in self._pieces(name, spans, None):
            out[start : start + len(piece)] = piece
        return out, scale_nk

    def expect(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor whose shape must be as the config says. Raises ModelError."""
        if self.shape(name) != shape:
            raise ModelError(f"{self.folder}: tensor {name!r} has shape {[*self.shape(name)]}, expected {list(shape)}")
        return self.read(name)

    def at_most(self, name: str, axis: int, size: int) -> None:
        """Of a tensor that is read in parts: raise ModelError if it is larger than config.json says."""
        shape = self.shape(name)
        if shape[axis : axis + 1] > (size,):
            raise ModelError(f"{self.folder}: tensor {name!r} has shape {list(shape)}, too large for its config.json")

    def _spans(self, name: str, rows: Range | None, columns: Range | None, index: int | None) -> list[Range]:
        """First and last + 1 in each dimension that is left once `index` is taken. Raises ModelError."""
        shape = self.shape(name)
        left = shape if index is None else shape[1:]
        fits = bool(left) and (index is None or index < shape[0])
        for axis, span in enumerate((rows, columns)):
            fits = fits and (span is None or (axis < len(left) and span[1] <= left[axis]))
        if not fits:
            raise ModelError(f"{self.folder}: tensor {name!r} has shape {list(shape)}, too small for its config.json")
        given = [rows, columns, *[None] * len(left)]
        return [span or (0, size) for span, size in zip(given, left, strict=False)]

    def _pieces(self, name: str, spans: list[Range], index: int | None) -> Iterator[tuple[int, Tensor]]:
        """(number of its first row in the part, rows as stored), one piece after the other."""
        if self._watch is not None:
            self._watch(name)
        stored, (first, last) = self.stored(name), spans[0]
        kind = stored.get_dtype()
        if kind not in FLOATS and not self.is_fp8(name):
            supported = f"{', '.join(FLOATS)}, and {FP8_NAME} beside a tensor {name + SCALE!r}"
            what = f"tensor {name!r} has dtype {kind}, which is not supported; supported: {supported}"
            raise ModelError(f"{self.folder / self._file_of[name]}: {what}")
        at = () if index is None else (index,)
        rest = tuple(slice(a, b) for a, b in spans[1:])
        step = max(1, PIECE_BYTES // max(1, ITEM_BYTES[kind] * math.prod(b - a for a, b in spans[1:])))
        for start in range(first, last, step):
            piece = stored[(*at, slice(start, min(start + step, last)), *rest)]
            self.bytes_read += piece.nbytes
            self.staged = max(self.staged, piece.nbytes)
            yield start - first, piece.to(self.device)

    # -- weights in FP8 ---------------------------------------------------------------------------------------------

    @cached_property
    def fp8_block(self) -> int | None:
        """Side of the blocks that factors stand for; None if config.json names no such format."""
        path = self.folder / "config.json"
        return fp8_block(path, read_json(path)) if path.is_file() else None

    def _scale(self, name: str, spans: list[Range]) -> Tensor:
        """float32 factors of the blocks that a part of a weight touches. Raises ModelError if they do not fit it."""
        block, shape, there = self.fp8_block, self.shape(name), self.shape(name + SCALE)
        if block is None:
            raise ModelError(f"{self.folder / 'config.json'}: no quantization_config, but tensor {name!r} is in FP8")
        wanted = tuple(-(-size // block) for size in shape)
        if len(shape) != 2 or there != wanted:
            what = f"tensor {name + SCALE!r} has shape {list(there)}, expected {list(wanted)}"
            raise ModelError(f"{self.folder}: {what}: a factor for each block of {block} x {block} of a matrix")
        n, k = (blocks_of(span, block) for span in spans)
        return self.read(name + SCALE, rows=n, columns=k, dtype=torch.float32)

    def close(self) -> None:
        self._open.clear()
