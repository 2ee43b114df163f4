"""x times a weight's transpose. On CPUs bfloat16 weights are packed once, in the layout oneDNN's matrix units read.

Unpacked, oneDNN repacks the weight at every call, which for a few rows costs more than the product. The plain form,
`torch.nn.functional.linear`, is the specification. Legend: T rows, N outputs, D inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(weight_ND: Tensor) -> Tensor:
    """The form in which `linear` is fastest: an opaque copy, or the weight itself where packing brings nothing."""
    if weight_ND.device.type != "cpu" or weight_ND.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return weight_ND
    return torch.ops.mkldnn._reorder_linear_weight(weight_ND, None)


def linear(x_TD: Tensor, weight: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[T, N], for a weight [N, D] as it is or as `pack` made it."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias_N, "none", [], "")
    return F.linear(x_TD, weight, bias_N)
