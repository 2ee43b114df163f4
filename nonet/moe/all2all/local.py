"""No ranks to go to: all slots are here. EP = 1, and every rank of a group whose weights travel instead.

Legend: see moe/base.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nonet.comm.group import Pending
from nonet.kernels import triton as gpu
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, group_by_slot, sum_pairs


def create(spec: All2AllSpec) -> All2All:
    return Local(spec)


class Local:
    """Groups a rank's own rows by slot."""

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec = spec
        self.captures = gpu.HAS_TRITON and spec.group.device.type == "cuda"  # the plain sort reads on the host
        self.takes: Takes = "pairs" if spec.exact else "rows"

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        sent = group_by_slot(x_TD, slot_TK, weight_TK, self.spec.num_slots, ticket=None)
        return Pending(lambda: sent)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        if self.takes == "rows":
            return Pending(lambda: y)
        return Pending(lambda: sum_pairs(y, sent).to(y.dtype))

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return count_E.unsqueeze(0).cpu()

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
