"""Writes what a rank's tokens chose, iteration by iteration, as files that TensorRT-LLM's tools read too.

A folder gets `meta_info.json` from rank 0 and `rank{R}.safetensors` from every rank: "{iteration}_{layer}" -> int32
[G], this rank's own tokens by slot; layers are the model's, dense ones counted. While a recording goes on its counts
stand in `rank{R}.partial`, so that a rank that is killed has lost nothing; `statistics` reads either.
Used by the engine's recorder. Knows no torch and nothing of how load is judged.
Legend: L MoE layers, G global slots.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from nonet.eplb.placement import Placement
from nonet.errors import ConfigError

META = "meta_info.json"
RANK_FILE = re.compile(r"rank(\d+)\.(safetensors|partial)")


def rank_file(rank: int, kind: str = "safetensors") -> str:
    return f"rank{rank}.{kind}"


def meta_info(
    placement: Placement, layers: Sequence[int], top_k: int, *, first_iteration: int, tp: int, dp: int, ep: bool
) -> dict[str, Any]:
    """What stands beside the counts. The first two keys are TensorRT-LLM's, whose readers ignore the others.

    `layers` are the model's indices of the placement's; `tp`, `dp`, `ep`: ranks, and whether experts are spread over
    all of them. An epoch lasts until the next one begins; there is one as long as the placement is static.
    """
    slot_map = {str(layer): row.tolist() for layer, row in zip(layers, placement.expert_LG, strict=True)}
    return {
        "num_experts": placement.fleet.num_slots,
        "num_experts_per_token": top_k,
        "num_logical_experts": placement.num_experts,
        "layout": {"tensor_parallel_size": tp, "data_parallel_size": dp, "enable_expert_parallel": ep},
        "epochs": [
            {
                "first_iteration": first_iteration,
                "slots_by_rank": list(placement.fleet.slots_by_rank),
                "slot_map": slot_map,
            }
        ],
    }


def check_folder(folder: Path) -> None:
    """Make the folder and see that it can be written to. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("expert_statistic_path", str(folder), f"cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("expert_statistic_path", str(folder), "no permission to write there; give another folder")


class Recording:
    """One rank's counts of successive iterations. What another run left under the same names is replaced.

    Every rank makes one when it has its first counts; `num_ranks` and `meta` are the same on all of them.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, meta: dict[str, Any]) -> None:
        self.folder, self.rank = folder, rank
        self.length = 0  # iterations so far
        epoch = meta["epochs"][0]
        self._first, self._layers = epoch["first_iteration"], [int(layer) for layer in epoch["slot_map"]]
        self._shape = len(self._layers), meta["num_experts"]
        check_folder(folder)
        (folder / rank_file(rank)).unlink(missing_ok=True)
        if rank == 0:
            for path in folder.iterdir():
                found = RANK_FILE.fullmatch(path.name)
                if found and int(found[1]) >= num_ranks:
                    path.unlink()
            _replace(folder / META, (json.dumps(meta) + "\n").encode())
        self._partial: BinaryIO | None = (folder / rank_file(rank, "partial")).open("wb")

    def add(self, count_LG: npt.NDArray[np.int32]) -> None:
        """The next iteration. What is written here survives the end of the process, however it ends."""
        assert count_LG.shape == self._shape
        assert self._partial is not None, "the recording is closed"
        self._partial.write(np.ascontiguousarray(count_LG, dtype=np.int32).tobytes())
        self._partial.flush()
        self.length += 1

    def close(self) -> None:
        """Turn what there is into the final file. A second call does nothing."""
        if self._partial is None:
            return
        self._partial.close()
        self._partial = None
        partial = self.folder / rank_file(self.rank, "partial")
        if self.length:
            count_NLG = read_partial(partial, *self._shape)
            tensors = {
                f"{self._first + n}_{layer}": count_NLG[n, i]
                for n in range(self.length)
                for i, layer in enumerate(self._layers)
            }
            _replace(self.folder / rank_file(self.rank), save(tensors))
        partial.unlink()


def read_partial(path: Path, num_layers: int, num_slots: int) -> npt.NDArray[np.int32]:
    """[N, L, G] counts of a recording that was not closed; an iteration cut off within is left out."""
    flat = np.fromfile(path, dtype=np.int32)
    size = num_layers * num_slots
    return flat[: len(flat) // size * size].reshape(-1, num_layers, num_slots)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    beside.replace(path)
