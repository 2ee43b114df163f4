"""Expert slots of one layer on this rank, and how a checkpoint fills them.

Whole experts under expert parallelism, else a slice of each. Filled by models while they load, read by expert kernels.
Legend: I expert intermediate (or this rank's slice of it), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.errors import ModelError
from nonet.kernels.linear import pack
from nonet.weights.loader import Checkpoint, Range

Names = Callable[[int], tuple[str, str, str]]  # expert -> names of its gate, up and down projections


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The weights in this rank's slots of one layer; a slot is an address, so slots need not adjoin.

    gate_up[s] is [2I, D] (gate above up), down[s] is [D, I], each in the form of `kernels.linear.pack`.
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


def fill_slots(checkpoint: Checkpoint, names: Names, experts: Sequence[int], span: Range) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I.

    Raises ModelError if a tensor is missing or an expert's three do not fit together.
    """
    gate_up, down = [], []
    hidden: int | None = None
    for expert in experts:
        own = names(expert)
        gate, up = (checkpoint.read(name, rows=span) for name in own[:2])
        back = checkpoint.read(own[2], columns=span)
        hidden = hidden or gate.shape[1]
        if {gate.shape[1], up.shape[1], back.shape[0]} != {hidden}:
            raise ModelError(f"{checkpoint.folder}: {', '.join(own)} have shapes that do not fit together")
        gate_up.append(pack(torch.cat([gate, up])))
        down.append(pack(back))
    return SlotWeights(tuple(gate_up), tuple(down))
