"""`nonet models`: which families there are and what each does, as its file says; or who serves a checkpoint.

A family's own words are the list: its ARCHITECTURES and the text at its top. Loads the families, so PyTorch too.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

from nonet.config.checkpoint import DTYPE_BYTES, ROPE_TYPES, read_spec, refuse_unsupported
from nonet.models.base import families, family_of


def listing(width: int) -> Iterator[str]:
    """Lines: every family with its architectures and its text, then what all of them take."""
    for name, module in families().items():
        yield f"{name}: {', '.join(module.ARCHITECTURES)}"
        for paragraph in (inspect.getdoc(module) or "").split("\n\n"):
            yield from textwrap.wrap(" ".join(paragraph.split()), width, initial_indent="  ", subsequent_indent="  ")
        yield ""
    dtypes, ropes = ", ".join(DTYPE_BYTES), ", ".join(ROPE_TYPES)
    fp8 = "where each expert has tensors of its own also in FP8 with a factor for each block"
    common = f"All: weights in {dtypes}, {fp8}; rope types {ropes}."
    yield from textwrap.wrap(common, width)


def served(model: str) -> str:
    """One line on who serves a folder, or a shipped model. Raises ConfigError or ModelError if nobody does."""
    spec = read_spec(model)
    family = family_of(spec).__name__.rpartition(".")[2]
    refuse_unsupported(spec)
    layers = f"experts in {len(spec.moe_layers)} of {spec.num_layers} layers, {spec.num_experts} in each"
    return f"{model}: {family} ({spec.architecture}), {layers}, {spec.top_k} a token"
