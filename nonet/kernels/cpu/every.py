"""All compiled kernels. Importing this compiles what no earlier process has: done once, before ranks are forked."""

from nonet.kernels.cpu import attention, exchange, experts, fp8, noise, norm, product, routing, rows

__all__ = ["attention", "exchange", "experts", "fp8", "noise", "norm", "product", "routing", "rows"]
