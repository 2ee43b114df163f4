"""x times a weight's transpose. On CPUs bfloat16 weights are packed once, in the layout oneDNN's matrix units read.

Unpacked, oneDNN repacks the weight at every call, which for a few rows costs more than the product. One thread with
very few rows is faster still by a compiled kernel that streams the plain weight. The specification is
`torch.nn.functional.linear`. Legend: T rows, N outputs, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Where a call of oneDNN costs more than it saves (measured): up to so many rows, and for weights of so many numbers.
MOST_STREAMED, SMALL = 4, 1 << 15


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight in the forms that `linear` chooses from."""

    plain_ND: Tensor
    packed: Tensor | None  # opaque; None where packing brings nothing


def pack(weight_ND: Tensor) -> Weight:
    """Make a weight ready for `linear`."""
    if weight_ND.device.type != "cpu" or weight_ND.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return Weight(weight_ND, None)
    return Weight(weight_ND.contiguous(), torch.ops.mkldnn._reorder_linear_weight(weight_ND, None))


def linear(x_TD: Tensor, weight: Weight, bias_N: Tensor | None = None) -> Tensor:
    """[T, N]."""
    if weight.packed is None:
        return F.linear(x_TD, weight.plain_ND, bias_N)
    few = x_TD.shape[0] <= (4 * MOST_STREAMED if weight.plain_ND.numel() <= SMALL else MOST_STREAMED)
    if few and x_TD.shape[0] and torch.get_num_threads() == 1:
        from nonet.kernels.cpu import product

        if product.STREAMS:
            return product.linear(x_TD, weight.plain_ND, bias_N)
    return torch.ops.mkldnn._linear_pointwise(x_TD, weight.packed, bias_N, "none", [], "")
