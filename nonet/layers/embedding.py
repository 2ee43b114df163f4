"""Token embedding and output logits, the vocabulary split over the tensor-parallel ranks (evenly or not).

Legend: T tokens, D hidden, B rows that want logits, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor

from nonet.comm.group import Group
from nonet.config.fleet import split_evenly
from nonet.kernels.linear import Weight, linear, pack
from nonet.weights.loader import Checkpoint


class Vocabulary:
    """A [V, D] table of which this rank holds consecutive rows."""

    def __init__(self, checkpoint: Checkpoint, name: str, vocab_size: int, tp: Group) -> None:
        self.tp = tp
        self.rows = split_evenly(vocab_size, tp.size)
        bounds = (0, *accumulate(self.rows))
        self.first, self.end = bounds[tp.rank], bounds[tp.rank + 1]
        checkpoint.at_most(name, 0, vocab_size)
        self.table = checkpoint.read(name, rows=(self.first, self.end))
        self._head: Weight | None = None

    def as_head(self) -> Vocabulary:
        """Make it ready for `logits`."""
        self._head = pack(self.table)
        return self

    def embed(self, token_T: Tensor, rows: tuple[int, ...]) -> Tensor:
        """[rows[rank], D]: this rank's share of the embedded rows."""
        if self.tp.size == 1:
            return F.embedding(token_T, self.table)
        here = (token_T >= self.first) & (token_T < self.end)
        x_TD = F.embedding((token_T - self.first).masked_fill(~here, 0), self.table)
        return self.tp.reduce_scatter_rows(x_TD.masked_fill(~here.unsqueeze(1), 0), rows).wait()

    def logits(self, x_BD: Tensor) -> Tensor:
        """[B, V] on every tensor-parallel rank."""
        assert self._head is not None, "as_head() comes first"
        part_BV = linear(x_BD, self._head)
        if self.tp.size == 1:
            return part_BV
        return self.tp.all_gather_rows(part_BV.t().contiguous(), self.rows).wait().t()
