"""Expert slots of one layer on this rank, and how a checkpoint fills them.

Whole experts under expert parallelism, else a slice of each. Filled by models while they load, read by expert kernels.
Legend: S slots, I expert intermediate (or this rank's slice of it), D hidden; i, d blocks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nonet.errors import ModelError
from nonet.kernels.fp8 import FP8, dequantize
from nonet.weights.loader import Checkpoint, Range

Names = Callable[[int], tuple[str, str, str]]  # expert -> names of its gate, up and down projections

# silu(gate) * up; or gpt-oss's, gate and up kept within 7: gate * sigmoid(1.702 * gate) * (up + 1)
Activation = Literal["silu", "clamped"]


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Factors of weights in FP8, float32, one for each block of `block` x `block` numbers.

    gate_up[s] is [2, i, d], gate's before up's, so that neither begins inside a block of the other; down[s] is [d, i].
    A slice of I need not begin with a block: `offset` is where its first number lies in its first one.
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    block: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The weights in this rank's slots of one layer; a slot is an address, so slots need not adjoin.

    gate_up[s] is [2I, D] (gate above up), down[s] is [D, I]; in FP8 with `scales`. Biases, where there are any, are
    gate_up_bias[s] [2I] and down_bias[s] [D]; of slices of one expert, only the first bears the latter.
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    stacked: tuple[Tensor, Tensor] | None = None  # the same memory as [S, 2I, D] and [S, D, I], where slots adjoin
    gate_up_bias: tuple[Tensor, ...] | None = None
    down_bias: tuple[Tensor, ...] | None = None
    scales: BlockScales | None = None
    activation: Activation = "silu"

    @classmethod
    def adjoining(cls, gate_up_SID: Tensor, down_SDI: Tensor) -> SlotWeights:
        """Slots that are consecutive parts of two tensors."""
        return cls(gate_up_SID.unbind(), down_SDI.unbind(), (gate_up_SID, down_SDI))

    @property
    def plain(self) -> bool:
        """Whether the two products and silu(gate) * up are all there is."""
        return self.scales is None and self.gate_up_bias is None and self.activation == "silu"

    @property
    def nbytes(self) -> int:
        """Memory of all slots, scales and biases included."""
        parts = [self.gate_up, self.down, self.gate_up_bias or (), self.down_bias or ()]
        if self.scales is not None:
            parts += [self.scales.gate_up, self.scales.down]
        return sum(tensor.nbytes for part in parts for tensor in part)

    def matrices(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [2I, D] and down [D, I] of a slot as numbers of `dtype`: from FP8, new ones at each call."""
        gate_up, down, scales = self.gate_up[slot], self.down[slot], self.scales
        if scales is None:
            return gate_up, down
        plain = torch.empty(gate_up.shape, dtype=dtype, device=gate_up.device)
        for part, scale_id, to in zip(gate_up.chunk(2), scales.gate_up[slot], plain.chunk(2), strict=True):
            dequantize(part, scale_id, scales.block, dtype, first=(scales.offset, 0), out=to)
        return plain, dequantize(down, scales.down[slot], scales.block, dtype, first=(0, scales.offset))

    def biases(self, slot: int) -> tuple[Tensor | None, Tensor | None]:
        """Of gate_up and of down."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None, None
        return self.gate_up_bias[slot], self.down_bias[slot]


def per_expert(prefix: str, gate: str, up: str, down: str) -> Names:
    """Names of checkpoints that hold each expert's three tensors by themselves: `prefix.7.gate.weight`."""

    def names(expert: int) -> tuple[str, str, str]:
        base = f"{prefix}.{expert}"
        return f"{base}.{gate}.weight", f"{base}.{up}.weight", f"{base}.{down}.weight"

    return names


def fill_slots(
    checkpoint: Checkpoint, names: Names, experts: Sequence[int], span: Range, whole: int | None = None
) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I.

    whole: I, as config.json says. Weights in FP8 stay in FP8, with their factors. Raises ModelError if a tensor is
    missing, larger than that, or an expert's three do not fit together.
    """
    if not experts:
        return SlotWeights((), ())
    for name in names(experts[0])[:2] if whole is not None else ():  # the others must be like it
        checkpoint.at_most(name, 0, whole or 0)
    hidden, is_fp8 = _common([names(expert) for expert in experts], checkpoint)
    width, dtype = span[1] - span[0], FP8 if is_fp8 else checkpoint.dtype
    gate_up_SID = torch.empty((len(experts), 2 * width, hidden), dtype=dtype, device=checkpoint.device)
    down_SDI = torch.empty((len(experts), hidden, width), dtype=dtype, device=checkpoint.device)
    gate_up_scale, down_scale = [], []
    for expert, gate_up, down in zip(experts, gate_up_SID, down_SDI, strict=True):
        gate, up, back = names(expert)
        if not is_fp8:
            checkpoint.read(gate, rows=span, out=gate_up[:width])
            checkpoint.read(up, rows=span, out=gate_up[width:])
            checkpoint.read(back, columns=span, out=down)
            continue
        gate_id = checkpoint.read_fp8(gate, rows=span, out=gate_up[:width])[1]
        up_id = checkpoint.read_fp8(up, rows=span, out=gate_up[width:])[1]
        gate_up_scale.append(torch.stack([gate_id, up_id]))
        down_scale.append(checkpoint.read_fp8(back, columns=span, out=down)[1])
    slots = SlotWeights.adjoining(gate_up_SID, down_SDI)
    if not is_fp8:
        return slots
    block = checkpoint.fp8_block or 0
    return replace(slots, scales=BlockScales(tuple(gate_up_scale), tuple(down_scale), block, span[0] % block))


def _common(names: Sequence[tuple[str, str, str]], checkpoint: Checkpoint) -> tuple[int, bool]:
    """(hidden width, whether in FP8) of all these experts. Raises ModelError where they differ."""
    found = set()
    for own in names:
        gate, up, down = (checkpoint.shape(name) for name in own)
        if not (len(gate) == len(up) == len(down) == 2 and gate[1] == up[1] == down[0]):
            raise ModelError(f"{checkpoint.folder}: {', '.join(own)} have shapes that do not fit together")
        found |= {(gate[1], checkpoint.is_fp8(name)) for name in own}
    if len(found) > 1:
        first, last = names[0][0], names[-1][-1]
        raise ModelError(f"{checkpoint.folder}: experts from {first} to {last} differ in width or in being FP8")
    return found.pop()
