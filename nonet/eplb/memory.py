"""What slots cost in memory on each rank: four lines, so that nobody takes the whole footprint for the overhead.

Bytes of an expert come from a model's config.json or from the user. Used by the advisor. Knows no placement.
"""

from __future__ import annotations

from dataclasses import dataclass

from nonet.config.checkpoint import DTYPE_BYTES, ModelSpec, read_spec
from nonet.errors import ConfigError

WINDOW = 1000  # steps of statistics by slot that are kept: vLLM's default window
MATRICES = 3  # gate, up and down
_COUNT, _INDEX = 4, 8  # bytes of a count in the window, and of an entry in the maps


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank with the most slots."""

    experts: int  # all experts in its slots
    redundancy: int  # the part of it that one slot an expert would not need, on average over ranks
    staging: int  # room for one layer's new experts
    maps_and_window: int  # expert to slot, slot to expert, and the counts by slot of the window

    @classmethod
    def of(
        cls, num_layers: int, num_experts: int, num_slots: int, num_ranks: int, bytes_per_expert: int,
        most_replicas: int = 2, window: int = WINDOW,
    ) -> Memory:  # fmt: skip
        """For slots spread evenly over ranks."""
        own = -(-num_slots // num_ranks)
        maps = num_layers * (num_slots * _INDEX + num_experts * (most_replicas + 1) * _INDEX)
        return cls(
            experts=num_layers * own * bytes_per_expert,
            redundancy=num_layers * (num_slots - num_experts) * bytes_per_expert // num_ranks,
            staging=own * bytes_per_expert,
            maps_and_window=maps + num_layers * num_slots * window * _COUNT,
        )

    def lines(self) -> list[str]:
        return [
            f"experts in all slots  {size(self.experts)}",
            f"of it redundancy      {size(self.redundancy)}",
            f"staging, one layer    {size(self.staging)}",
            f"maps and statistics   {size(self.maps_and_window)}",
        ]


def size(count: int) -> str:
    return f"{count / 2**30:9.3f} GiB" if count >= 2**27 else f"{count / 2**20:9.3f} MiB"


def bytes_per_expert(model: str) -> int:
    """Of one routed expert of a checkpoint, from its config.json. Raises ConfigError or ModelError.

    FP8 with block scales counts one byte a weight and four a scale; other quantised forms are not known here.
    """
    spec = read_spec(model)
    if not (spec.num_experts and spec.moe_intermediate_size):
        raise ConfigError("model", model, "its config.json names no experts; give --bytes_per_expert")
    weights = MATRICES * spec.hidden_size * spec.moe_intermediate_size
    quantized = spec.raw.get("quantization_config")
    if not quantized:
        if spec.dtype not in DTYPE_BYTES:
            raise ConfigError("model", model, f"its dtype {spec.dtype} is not known; give --bytes_per_expert")
        return weights * DTYPE_BYTES[spec.dtype]
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "fp8":
        raise ConfigError("model", model, "its quantization is not known here; give --bytes_per_expert")
    return weights + 4 * _scales(spec, quantized.get("weight_block_size"))


def _scales(spec: ModelSpec, block: object) -> int:
    """Scales of an expert: one a block of each matrix, or one a matrix."""
    if not isinstance(block, list | tuple) or len(block) != 2:
        return MATRICES
    rows, columns = (int(size) for size in block)
    width, hidden = spec.moe_intermediate_size, spec.hidden_size
    wide = -(-width // rows) * -(-hidden // columns)
    return 2 * wide + -(-hidden // rows) * -(-width // columns)
