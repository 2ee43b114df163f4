"""Expert parallelism off: every rank holds a slice of every expert's intermediate width.

Rows are gathered over all ranks, each computes its slice's part of every row, and the parts are summed back.
Legend: see moe/base.py; I is this rank's slice of the expert intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nonet.comm.group import Pending
from nonet.moe.all2all._rows import pack, unpack
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, gather_counts, group_by_slot


def create(spec: All2AllSpec) -> All2All:
    return TensorSlices(spec)


class TensorSlices:
    captures = False
    takes: Takes = "rows"

    def __init__(self, spec: All2AllSpec) -> None:
        assert not spec.exact, "sums of slices depend on the slicing; config.resolve refuses this"
        self.spec = spec

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        gathering = self.spec.group.all_gather_rows(pack(x_TD, slot_TK, weight_TK), rows)

        def finish() -> Dispatched:
            x_ND, slot_NK, weight_NK = unpack(gathering.wait(), self.spec)
            return group_by_slot(x_ND, slot_NK, weight_NK, self.spec.fleet.num_slots, tuple(rows))

        return Pending(finish)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        rows = sent.ticket
        assert isinstance(rows, tuple)
        return self.spec.group.reduce_scatter_rows(y, rows)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
