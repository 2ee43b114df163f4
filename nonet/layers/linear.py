"""x times a weight's transpose, in the form that is fastest where it runs. Legend: T rows, N outputs, D inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_first(x_TD: Tensor) -> bool:
    """Whether products are faster with the weight on the left: on CPUs in 16 bits oneDNN repacks its right operand at
    every call, and the weight is the larger one (measured: 1.2 to 2.5 times faster for 1 to 128 rows)."""
    return x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16)


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[T, N]; perhaps a transposed view."""
    if not weight_first(x_TD):
        return F.linear(x_TD, weight_ND, bias_N)
    # as a batch of one: the batched product also has a fast path for a single row
    y_TN = torch.bmm(weight_ND.unsqueeze(0), x_TD.t().unsqueeze(0))[0].t()
    return y_TN if bias_N is None else y_TN + bias_N
