"""How unevenly recorded tokens fell: TensorRT-LLM's table by layer, as text, as numbers, and as a picture (`picture`).

The measures are those of its report_load_statistics.py: taken in each iteration, then averaged over iterations.
Used by `nonet eplb`. Legend: N iterations, L MoE layers, X what is compared: ranks, or slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nonet.eplb.load import imbalance
from nonet.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Report:
    """By layer: tokens a rank, their standard deviation over ranks (N - 1), and the imbalance (max - mean) / mean.

    `of_sum_L` is the imbalance of the tokens of all iterations added up: what a better placement could remove. The
    rest of `imbalance_L` is the spread from iteration to iteration, which no placement made beforehand can.
    `share_LX` are mean tokens over the mean of all X.
    """

    layers: tuple[int, ...]
    mean_L: Floats
    std_L: Floats
    imbalance_L: Floats
    of_sum_L: Floats
    share_LX: Floats
    iterations: range

    @property
    def columns(self) -> dict[str, Floats]:
        """The table's, by title."""
        return {"mean": self.mean_L, "std": self.std_L, "imbalance-ratio": self.imbalance_L}

    def text(self) -> str:
        """The table as TensorRT-LLM prints it."""
        return "Load statistics:\n" + table(self.layers, self.columns)

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-safe. The keys of layers are the model's indices, and `average`."""
        columns = {name.replace("-", "_"): values for name, values in self.columns.items()}
        columns["imbalance_ratio_of_sum"] = self.of_sum_L
        rows = {
            str(layer): {name: float(values[i]) for name, values in columns.items()}
            for i, layer in enumerate(self.layers)
        }
        average = {name: float(values.mean()) for name, values in columns.items()}
        return {
            "iter_start": self.iterations.start,
            "iter_stop": self.iterations.stop,
            "layers": rows,
            "average": average,
        }


def report(load_NLX: Floats, layers: Sequence[int], first_iteration: int = 0) -> Report:
    """From tokens by iteration, layer and rank (or slot). Iterations in which a layer saw no token do not count for it.

    Raises ConfigError if there is nothing to compare.
    """
    if load_NLX.shape[-1] < 2:
        remedy = "there is nothing to compare; use --per_expert, or --ep_size for ranks as they could be"
        raise ConfigError("ranks", load_NLX.shape[-1], remedy)
    seen_NL = load_NLX.any(axis=-1)
    count_L = np.maximum(seen_NL.sum(axis=0), 1)

    def averaged(measure_NL: Floats) -> Floats:
        out: Floats = np.where(seen_NL, measure_NL, 0).sum(axis=0) / count_L
        return out

    mean_L = averaged(load_NLX.mean(axis=-1))
    sum_LX = load_NLX.sum(axis=0)
    total_L1 = np.maximum(sum_LX.mean(axis=-1, keepdims=True), 1e-300)
    return Report(
        layers=tuple(layers),
        mean_L=mean_L,
        std_L=averaged(load_NLX.std(axis=-1, ddof=1)),
        imbalance_L=averaged(imbalance(load_NLX)),
        of_sum_L=imbalance(sum_LX),
        share_LX=sum_LX / total_L1,
        iterations=range(first_iteration, first_iteration + len(load_NLX)),
    )


def table(layers: Sequence[int], columns: Mapping[str, Floats]) -> str:
    """Numbers by layer below titles, and their average: six digits after the point where any are needed."""
    index = [*map(str, layers), "average"]
    width = max(map(len, index))
    lines = [" " * width, *(name.ljust(width) for name in index)]
    for title, values in columns.items():
        cells = [title, *_numbers([*map(float, values), float(np.mean(values))])]
        across = max(map(len, cells))
        lines = [f"{line}  {cell:>{across}}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> list[str]:
    """Zeros at the end are left out where all have them, but for the first digit after the point."""
    texts = [f"{value:.6f}" for value in values]
    while all(text.endswith("0") and not text.endswith(".0") for text in texts):
        texts = [text[:-1] for text in texts]
    return texts
