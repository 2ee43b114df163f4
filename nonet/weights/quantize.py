"""Writes a checkpoint again with its experts and linear layers in FP8, in blocks, as DeepSeek-V3's are.

Used by `nonet quantize`; what it writes the loader reads, and others that know the format. Knows no model: what is
quantized goes by the names that Hugging Face gives projections. Tensors pass in pieces, so memory is bounded.
Legend: N rows, K columns, n, k blocks of them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nonet.config.checkpoint import find_folder, read_json
from nonet.errors import ConfigError, ModelError
from nonet.kernels.fp8 import quantize
from nonet.weights.loader import FLOATS, FP8_NAME, ITEM_BYTES, PIECE_BYTES, SCALE, Checkpoint

# Projections by their names: q_proj, kv_a_proj_with_mqa, w1. Embeddings, norms, routers, heads have others and stay, as
# does eh_proj, which DeepSeek leaves in its own type too.
_LINEAR = re.compile(r"(?:^|\.)(?!eh_proj)(?:\w+_proj(?:_with_mqa)?|w[123])\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]  # bytes read so far, of how many


@dataclass(frozen=True)
class Quantized:
    """What was done: tensors and their bytes before and after, and the largest piece on its way in memory."""

    quantized: int
    kept: int
    bytes_before: int
    bytes_after: int
    files: int
    piece_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to write. A weight and its factors come from the same source."""

    name: str
    kind: str  # as safetensors names types
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.kind] * math.prod(self.shape)


def quantize_folder(
    source: str,
    target: Path,
    *,
    block: int = 128,
    shard_bytes: int = 4 << 30,
    progress: Progress = lambda done, total: None,
) -> Quantized:
    """Write `source` (a folder, or a shipped model's name) to the folder `target`, which must be new or empty.

    Other files, as the tokenizer's, are copied. Nothing is left behind if it fails. Raises ConfigError for folders that
    will not do, ModelError for a checkpoint that is broken, quantized already, or has no experts of two dimensions.
    """
    try:
        folder = find_folder(source)
    except ConfigError as error:
        raise ConfigError("SRC", source, error.remedy) from error
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("DST", str(target), "is there already; give a new or an empty folder")
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ModelError(f"{folder / 'config.json'}: has a quantization_config: it is quantized already")
    checkpoint = Checkpoint(folder, torch.float32, torch.device("cpu"))
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        done = _Writer(checkpoint, partial, block, shard_bytes, progress).run(config)
        _copy_others(folder, partial)
        partial.chmod(0o755)
        partial.replace(target)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError("DST", str(target), f"cannot be written: {error.strerror or error}{where}") from error
    finally:
        checkpoint.close()
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well
    return done


def _copy_others(folder: Path, target: Path) -> None:
    """Tokenizer, generation config, licence: whatever lies beside the weights."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_FILES and path.name not in ("config.json", _INDEX):
            shutil.copyfile(path, target / path.name)


class _Writer:
    def __init__(self, checkpoint: Checkpoint, folder: Path, block: int, shard_bytes: int, progress: Progress) -> None:
        self.checkpoint, self.folder, self.block, self.progress = checkpoint, folder, block, progress
        self.sources = [self._describe(name) for name in sorted(checkpoint.names(), key=_natural)]
        self.linear = {t.name for t in self.sources if _LINEAR.search(t.name) and len(t.shape) == 2}
        self._check()
        self.shards = list(self._shards(shard_bytes))
        self.done, self.piece_bytes = 0, 0
        self.total = sum(t.nbytes for t in self.sources)

    def _describe(self, name: str) -> _Tensor:
        stored = self.checkpoint.stored(name)
        kind = stored.get_dtype()
        if kind not in FLOATS:
            raise ModelError(
                f"{self.checkpoint.folder}: tensor {name!r} has dtype {kind}; supported: {', '.join(FLOATS)}"
            )
        return _Tensor(name, kind, tuple(stored.get_shape()))

    def _check(self) -> None:
        """Raises ModelError."""
        folder = self.checkpoint.folder
        if not any(_EXPERT.search(name) for name in self.linear):
            remedy = "experts in one tensor for all, as Llama 4's and gpt-oss's, have no such format"
            raise ModelError(f"{folder}: holds no experts with a tensor for each projection; {remedy}")

    def _shards(self, limit: int) -> Iterator[list[_Tensor]]:
        """The sources of each file, one after the other, up to `limit` bytes as they will be."""
        shard: list[_Tensor] = []
        size = 0
        for t in self.sources:
            own = sum(part.nbytes for part in self._parts(t))
            if shard and size + own > limit:
                yield shard
                shard, size = [], 0
            shard.append(t)
            size += own
        yield shard

    def _parts(self, source: _Tensor) -> list[_Tensor]:
        """What stands for a tensor: itself, or a weight in FP8 and its factors."""
        if source.name not in self.linear:
            return [source]
        n, k = (-(-size // self.block) for size in source.shape)
        return [_Tensor(source.name, FP8_NAME, source.shape), _Tensor(source.name + SCALE, "F32", (n, k))]

    def run(self, config: dict[str, object]) -> Quantized:
        file_of: dict[str, str] = {}
        after = 0
        for number, sources in enumerate(self.shards, start=1):
            name = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
            parts = [part for t in sources for part in self._parts(t)]
            with open(self.folder / name, "wb") as file:
                self._write(file, sources, parts)
            file_of |= {part.name: name for part in parts}
            after += sum(part.nbytes for part in parts)
        _write_json(
            self.folder / _INDEX, {"metadata": {"total_size": after}, "weight_map": dict(sorted(file_of.items()))}
        )
        others = [
            t.name.removesuffix(".weight") for t in self.sources if t.name not in self.linear and len(t.shape) == 2
        ]
        quantization = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.block, self.block],
            "modules_to_not_convert": others,
        }
        _write_json(self.folder / "config.json", {**config, "quantization_config": quantization})
        counts = len(self.linear), len(self.sources) - len(self.linear)
        return Quantized(*counts, self.total, after, len(self.shards), self.piece_bytes)

    def _write(self, file: BinaryIO, sources: Sequence[_Tensor], parts: Sequence[_Tensor]) -> None:
        """One file: the header, then each tensor where the header says. Wide types come first, so all are aligned."""
        at, entries, start_of = 0, {}, {}
        for part in sorted(parts, key=lambda part: -ITEM_BYTES[part.kind]):
            start_of[part.name], end = at, at + part.nbytes
            entries[part.name] = {"dtype": part.kind, "shape": list(part.shape), "data_offsets": [at, end]}
            at = end
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        base = file.tell()
        start_of = {name: base + start for name, start in start_of.items()}
        for source in sources:
            self._write_tensor(file, source, start_of)
        file.truncate(base + at)

    def _write_tensor(self, file: BinaryIO, source: _Tensor, start_of: dict[str, int]) -> None:
        """A piece of rows after the other; of weights to quantize whole blocks of rows."""
        name, scales = source.name, []
        file.seek(start_of[name])
        for piece in self._pieces(source):
            self.piece_bytes = max(self.piece_bytes, piece.nbytes)
            if name in self.linear:
                try:
                    numbers, scale_nk = quantize(piece, self.block)
                except ValueError as error:
                    raise ModelError(
                        f"{self.checkpoint.folder}: tensor {name!r} cannot be quantized: {error}"
                    ) from error
                scales.append(scale_nk)
                _write_numbers(file, numbers)
            else:
                _write_numbers(file, piece)
            self.done += piece.nbytes
            self.progress(self.done, self.total)
        if scales:
            file.seek(start_of[name + SCALE])
            _write_numbers(file, torch.cat(scales))

    def _pieces(self, source: _Tensor) -> Iterator[Tensor]:
        stored = self.checkpoint.stored(source.name)
        if not source.shape:
            yield self.checkpoint.stored(source.name)[...]
            return
        rows = PIECE_BYTES // max(1, ITEM_BYTES[source.kind] * math.prod(source.shape[1:]))
        rows = max(self.block, rows // self.block * self.block)
        for first in range(0, source.shape[0], rows):
            yield stored[first : min(first + rows, source.shape[0])]


def _write_numbers(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
