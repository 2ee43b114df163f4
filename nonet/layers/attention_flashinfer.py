"""Attention by FlashInfer (Ye et al., arXiv:2501.01005), where `attention_backend` names it: grouped queries, windows.

The batch's builder tells a `FlashInfer` of each step's sequences and puts the `Step` into the batch; `layers.attention`
attends through it. Plans are made on the host, one a step for each kind of layer. The library is imported lazily.
Interface: flashinfer's BatchDecode- and BatchPrefillWithPagedKVCacheWrapper, version 0.6.12, here called planners.
Legend: T tokens, H query heads, h KV heads, d head_dim, B decoding sequences, S sequences, N blocks of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.layers.attention import Attention, KvCache, Sight

NAME = "flashinfer"
WORKSPACE_BYTES = 394 << 20  # for the parts of contexts that are attended to apart; vLLM's number


@dataclass(frozen=True)
class _Kind:
    """What a plan depends on besides the sequences."""

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    window: int | None
    scale: float | None


@dataclass(frozen=True)
class _Sequences:
    """Some of a step's sequences in the library's terms: int32, on the host."""

    row_S1: Tensor  # where the new tokens of each begin, and the last one's end
    used_S1: Tensor  # the same of their blocks
    block_N: Tensor
    last_S: Tensor  # tokens in the last block of each


class FlashInfer:
    """The library's memory and its planners, which live as long as the rank. Steps take turns with them."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        import flashinfer

        self._library, self.block_size = flashinfer, block_size
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._planners: dict[tuple[_Kind, bool], Any] = {}
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.turn: Step | None = None  # whose plans the planners hold

    def prepare(self, layers: Iterable[Attention], dtype: torch.dtype) -> None:
        """Has the library compile what it lacks for these layers, before any rank waits for another inside a step.

        Raises ConfigError where it cannot, or has no kernels for a layer.
        """
        groups = [self._sequences([[0]], [0], [count]) for count in (1, 2)]
        kinds = set()
        for own in layers:
            _check(own.sight)
            kinds.add(_Kind(own.num_heads, own.num_kv_heads, own.head_dim, dtype, own.sight.window, own.sight.scale))
        for kind in kinds:
            try:
                self.plan(kind, *groups)
            except torch.OutOfMemoryError:
                raise
            except (OSError, RuntimeError) as error:
                why = f"its kernels cannot be compiled here ({_line_of(error)})"
                raise ConfigError("attention_backend", NAME, f"{why}; install nvcc and ninja, or use triton") from error

    def step(
        self, blocks: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], num_decode: int
    ) -> Step:
        """For sequences with so many tokens before and new ones, decoding ones first, and the blocks of each."""
        parts = slice(num_decode), slice(num_decode, None)
        groups = [self._sequences(blocks[part], starts[part], counts[part]) for part in parts]
        return Step(self, num_decode, *groups)

    def _sequences(
        self, blocks: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int]
    ) -> _Sequences | None:
        if not counts:
            return None
        end_S = np.add(starts, counts)
        used_S = -(-end_S // self.block_size)
        own = [number for row, used in zip(blocks, used_S.tolist(), strict=True) for number in row[:used]]
        columns = ([0, *np.cumsum(counts)], [0, *np.cumsum(used_S)], own, end_S - (used_S - 1) * self.block_size)
        return _Sequences(*(torch.from_numpy(np.array(column, dtype=np.int32)) for column in columns))

    def begin(self, step: Step) -> None:
        """It is this step's turn.

        Waits until the last one's plans have reached the GPU: their host memory is used again.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self.turn = step

    def plan(self, kind: _Kind, decoding: _Sequences | None, prompts: _Sequences | None) -> None:
        """For all layers of this kind."""
        shape = kind.heads, kind.kv_heads, kind.width, self.block_size
        more = {
            "window_left": -1 if kind.window is None else kind.window - 1,
            "sm_scale": kind.scale,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
        }
        if decoding is not None:
            where = decoding.used_S1, decoding.block_N, decoding.last_S
            self.planner(kind, True).plan(*where, *shape, **more)
        if prompts is not None:
            where = prompts.used_S1, prompts.block_N, prompts.last_S
            self.planner(kind, False).plan(prompts.row_S1, *where, *shape, causal=True, **more)
        if self._copied is not None:
            self._copied.record()

    def planner(self, kind: _Kind, decodes: bool) -> Any:
        """Each holds one plan."""
        if (kind, decodes) not in self._planners:
            if decodes:
                made = self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, use_tensor_cores=True)
            else:
                made = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace)
            self._planners[kind, decodes] = made
        return self._planners[kind, decodes]


class Step:
    """One step's sequences, and for which kinds of layer they are planned."""

    def __init__(
        self, flashinfer: FlashInfer, num_decode: int, decoding: _Sequences | None, prompts: _Sequences | None
    ) -> None:
        self._flashinfer, self._num_decode, self._decoding, self._prompts = flashinfer, num_decode, decoding, prompts
        self._planned: set[_Kind] = set()

    def attend(self, q_THd: Tensor, cache: KvCache, sight: Sight, out: Tensor) -> None:
        """Into out [T, H, d]. Raises ConfigError for chunks and sinks, which the planners do not know."""
        _check(sight)
        if not self._planned:
            self._flashinfer.begin(self)
        assert self._flashinfer.turn is self, "another step has planned since"
        _, H, d = q_THd.shape
        kind = _Kind(H, cache[0].shape[1], d, q_THd.dtype, sight.window, sight.scale)
        if kind not in self._planned:
            self._flashinfer.plan(kind, self._decoding, self._prompts)
            self._planned.add(kind)
        pages = tuple(part.unflatten(0, (-1, self._flashinfer.block_size)) for part in cache)
        B = self._num_decode
        for decodes, own, rows in ((True, self._decoding, slice(B)), (False, self._prompts, slice(B, None))):
            if own is not None:
                self._flashinfer.planner(kind, decodes).run(q_THd[rows].contiguous(), pages, out=out[rows])


def _line_of(error: Exception) -> str:
    """What a compiler's output says in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _check(sight: Sight) -> None:
    if sight.chunk is not None or sight.sink_H is not None:
        what = "sinks" if sight.chunk is None else "attention in chunks"
        raise ConfigError("attention_backend", NAME, f"has no {what}, which the model needs; use triton")
