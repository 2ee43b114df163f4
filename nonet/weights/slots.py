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


def fill_slots(checkpoint: Checkpoint, names: Names, experts: Sequence[int], span: Range) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I."""
    gate_up, down = [], []
    for expert in experts:
        gate, up, back = names(expert)
        gate_up.append(torch.cat([checkpoint.read(gate, rows=span), checkpoint.read(up, rows=span)]))
        down.append(checkpoint.read(back, columns=span))
    return SlotWeights(tuple(gate_up), tuple(down))
