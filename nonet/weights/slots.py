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

    @classmethod
    def adjoining(cls, gate_up_SID: Tensor, down_SDI: Tensor) -> SlotWeights:
        """Slots that are consecutive parts of two tensors."""
        return cls(gate_up_SID.unbind(), down_SDI.unbind(), (gate_up_SID, down_SDI))


def per_expert(prefix: str, gate: str, up: str, down: str) -> Names:
    """Names of checkpoints that hold each expert's three tensors by themselves: `prefix.7.gate.weight`."""

    def names(expert: int) -> tuple[str, str, str]:
        base = f"{prefix}.{expert}"
        return f"{base}.{gate}.weight", f"{base}.{up}.weight", f"{base}.{down}.weight"

    return names


def fill_slots(checkpoint: Checkpoint, names: Names, experts: Sequence[int], span: Range) -> SlotWeights:
    """One slot for each of `experts`, in order, with the part `span` of their intermediate width I.

    Raises ModelError if a tensor is missing or an expert's three do not fit together.
    """
    width = span[1] - span[0]
    stacks: tuple[Tensor, Tensor] | None = None
    for slot, expert in enumerate(experts):
        own = names(expert)
        gate, up = (checkpoint.read(name, rows=span) for name in own[:2])
        back = checkpoint.read(own[2], columns=span)
        if stacks is None:
            hidden = gate.shape[1]
            stacks = back.new_empty((len(experts), 2 * width, hidden)), back.new_empty((len(experts), hidden, width))
        if {gate.shape[1], up.shape[1], back.shape[0]} != {stacks[0].shape[2]}:
            raise ModelError(f"{checkpoint.folder}: {', '.join(own)} have shapes that do not fit together")
        torch.cat([gate, up], out=stacks[0][slot])
        stacks[1][slot] = back
    return SlotWeights((), ()) if stacks is None else SlotWeights.adjoining(*stacks)
