"""Expert slots of one layer on this rank, and how a checkpoint fills them.

Whole experts under expert parallelism, else a slice of each. Filled by models while they load, read by expert kernels.
Legend: I expert intermediate (or this rank's slice of it), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.weights.loader import Checkpoint, Range

Names = Callable[[int], tuple[str, str, str]]  # expert -> names of its gate, up and down projections


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The weights in this rank's slots of one layer; a slot is an address, so slots need not adjoin.

    gate_up[s] is [2I, D] (gate above up), down[s] is [D, I].
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    stacked: tuple[Tensor, Tensor] | None = None  # the same memory as [S, 2I, D] and [S, D, I], where slots adjoin


def fill_slots(checkpoint: Checkpoint, names: Names, experts: Sequence[int], span: Range) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I."""
    width = span[1] - span[0]
    gate_up: Tensor | None = None
    down: Tensor | None = None
    for slot, expert in enumerate(experts):
        parts = [checkpoint.read(name, rows=span) for name in names(expert)[:2]]
        back = checkpoint.read(names(expert)[2], columns=span)
        if gate_up is None or down is None:
            gate_up = back.new_empty((len(experts), 2 * width, back.shape[0]))
            down = back.new_empty((len(experts), *back.shape))
        torch.cat(parts, out=gate_up[slot])
        down[slot] = back
    assert gate_up is not None, "a rank holds at least one slot"
    assert down is not None
    return SlotWeights(gate_up.unbind(), down.unbind(), (gate_up, down))
