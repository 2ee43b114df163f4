"""Reads recorded routing: nonet's own folders, TensorRT-LLM's, and the arrays of SGLang's recorder.

A folder is as `recording` describes it; TensorRT-LLM's has the first two keys of meta_info.json only. SGLang dumps an
array `logical_count` [steps, layers, experts]; .npy, .npz and .safetensors are read here, .pt by the command line, for
it needs torch. What is broken is refused in one line that names the file and the key. Used by `nonet eplb`, simulation.
Legend: N iterations, R source ranks, L MoE layers, G global slots, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.eplb.recorded import Counts, Epoch, Statistics, iterations_between
from nonet.eplb.recording import META, RANK_FILE, rank_file, read_partial
from nonet.errors import ConfigError

__all__ = ["Statistics", "from_logical_count", "read_statistics"]

FIELD = "expert_statistic_path"
DUMPS = (".npy", ".npz", ".safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")
SlotMap = Mapping[int, Sequence[int]]  # model layer -> the expert in each slot


def read_statistics(
    path: str | Path, start: int | None = None, stop: int | None = None, *, slot_map: SlotMap | None = None
) -> Statistics:
    """Iterations `start` to `stop` - 1 (default: all) of a folder, or of a file with `logical_count`.

    `slot_map` is for folders that do not say what their slots held: TensorRT-LLM's, of a run with a load balancer.
    Raises ConfigError.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, start, stop, slot_map)
    if not path.exists():
        raise ConfigError(FIELD, str(path), "no such folder; give the one that a recording wrote")
    if slot_map is not None:
        raise ConfigError("slot_map", "(given)", f"{path.name} counts experts, not slots; leave it out")
    return from_logical_count(_read_array(path), str(path)).between(start, stop)


# -- arrays -----------------------------------------------------------------------------------------------------------


def from_logical_count(count: npt.NDArray[Any], path: str, num_ranks: int = 1) -> Statistics:
    """From tokens by expert [steps, layers, experts] (or of one step, without the first axis), of all ranks together.

    Layers that no token passed in any step are taken for dense ones and left out. `num_ranks` is how many ranks are to
    hold the experts in order. Raises ConfigError for what is no count.
    """
    if count.ndim == 2:
        count = count[None]
    if count.ndim != 3 or 0 in count.shape:
        raise ConfigError(
            FIELD, path, f"logical_count has shape {list(count.shape)}; expected [steps, layers, experts]"
        )
    if count.dtype.kind not in "iuf" or not np.isfinite(count).all() or (count < 0).any() or (count % 1).any():
        raise ConfigError(FIELD, path, "logical_count holds values that are no counts of tokens")
    if count.max() > np.iinfo(np.int32).max:
        raise ConfigError(FIELD, path, "logical_count holds a count of more than 31 bits")
    layers = np.flatnonzero(count.any(axis=(0, 2)))
    if not len(layers):
        raise ConfigError(FIELD, path, "logical_count is zero everywhere: nothing was recorded")
    count_NLE = count[:, layers].astype(np.int32)
    placement = Placement.contiguous(len(layers), count.shape[2], num_ranks)
    return Statistics(count_NLE[:, None], tuple(layers.tolist()), 0, (Epoch(0, placement),), spread=False)


def _read_array(path: Path) -> npt.NDArray[Any]:
    if path.suffix not in DUMPS:
        raise ConfigError(FIELD, str(path), f"is neither a folder of statistics nor one of {', '.join(DUMPS)}, .pt")
    try:
        if path.suffix == ".npy":
            array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                array = arrays["logical_count"]
        else:
            with safe_open(path, framework="np") as tensors:
                array = tensors.get_tensor("logical_count")
    except (KeyError, SafetensorError, ValueError, OSError, EOFError) as error:
        raise ConfigError(FIELD, str(path), f"holds no array logical_count that can be read: {error}") from error
    return array


# -- folders ----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, start: int | None, stop: int | None, slot_map: SlotMap | None) -> Statistics:
    meta = _read_meta(folder)
    paths = _rank_files(folder, meta)
    slots = _positive(folder, meta, "num_experts")
    ranks = [_open(path, slots, meta) for path in paths]
    layers, first, end = _common(ranks)
    chosen = iterations_between(start, stop, first, end)
    count = np.empty((len(chosen), len(ranks), len(layers), slots), dtype=np.int32)
    for r, rank in enumerate(ranks):
        rank.read(chosen, layers, count[:, r])
    epochs, spread = _epochs(folder, meta, layers, slots, len(ranks), slot_map, chosen.start)
    return Statistics(count, layers, chosen.start, epochs, _positive(folder, meta, "num_experts_per_token"), spread)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(FIELD, str(folder), f"holds no {META}; give the folder that a recording wrote") from error
    except (ValueError, OSError) as error:
        raise ConfigError(FIELD, str(path), f"is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(FIELD, str(path), "must hold a JSON mapping with num_experts")
    return meta


def _positive(folder: Path, meta: Mapping[str, Any], key: str) -> int:
    value = meta.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(FIELD, str(folder / META), f"{key} = {value!r}; must be a positive count")
    return value


def _rank_files(folder: Path, meta: Mapping[str, Any]) -> list[Path]:
    """One file a rank, in order; the final one where both are there. Raises ConfigError if a rank has none."""
    found = {int(m[1]) for m in map(RANK_FILE.fullmatch, (path.name for path in folder.iterdir())) if m}
    if not found:
        raise ConfigError(FIELD, str(folder), f"holds no {rank_file(0)}: nothing is recorded yet")
    count = max(found) + 1
    layout = meta.get("layout")
    if isinstance(layout, dict):
        count = _positive(folder, layout, "tensor_parallel_size") * _positive(folder, layout, "data_parallel_size")
        if max(found) >= count:
            what = f"is not of this run, which had {count} ranks; remove it"
            raise ConfigError(FIELD, str(folder / rank_file(max(found))), what)
    missing = sorted(set(range(count)) - found)
    if missing:
        raise ConfigError(FIELD, str(folder / rank_file(missing[0])), f"is missing; there are {count} ranks")
    final = [folder / rank_file(rank) for rank in range(count)]
    return [path if path.exists() else path.with_suffix(".partial") for path in final]


class _RankFile:
    """One rank's counts: which iterations and layers there are, and reading some of them."""

    def __init__(self, path: Path, slots: int) -> None:
        self.path, self.slots = path, slots
        try:
            with safe_open(path, framework="np") as tensors:
                names = tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(FIELD, str(path), f"cannot be read (truncated?): {error}") from error
        keys = []
        for name in names:
            match = _KEY.fullmatch(name)
            if match is None:
                raise ConfigError(FIELD, str(path), f"key {name!r} is not ITERATION_LAYER, as in 100_3")
            keys.append((int(match[1]), int(match[2])))
        if not keys:
            raise ConfigError(FIELD, str(path), "holds no iteration: nothing was recorded")
        self.iterations, self.layers = sorted({n for n, _ in keys}), sorted({layer for _, layer in keys})
        gap = next((n for n in range(self.iterations[0], self.iterations[-1]) if n not in set(self.iterations)), None)
        if gap is not None:
            first, last = self.iterations[0], self.iterations[-1]
            raise ConfigError(FIELD, str(path), f"iteration {gap} is missing; there are {first} to {last}")
        lost = sorted({(n, layer) for n in self.iterations for layer in self.layers} - set(keys))
        if lost:
            raise ConfigError(FIELD, str(path), f"layer {lost[0][1]} of iteration {lost[0][0]} is missing")

    def read(self, iterations: range, layers: Sequence[int], out_NLG: Counts) -> None:
        with safe_open(self.path, framework="np") as tensors:
            for n, iteration in enumerate(iterations):
                for i, layer in enumerate(layers):
                    name = f"{iteration}_{layer}"
                    count = tensors.get_tensor(name)
                    if count.shape != (self.slots,) or count.dtype.kind not in "iu":
                        what = f"{name!r} is {count.dtype} {list(count.shape)}; expected int32 [{self.slots}]"
                        raise ConfigError(FIELD, str(self.path), what)
                    out_NLG[n, i] = count
        if out_NLG.min(initial=0) < 0:
            raise ConfigError(FIELD, str(self.path), "holds a negative count")


class _PartialFile:
    """The same of a run that was killed."""

    def __init__(self, path: Path, slots: int, meta: Mapping[str, Any]) -> None:
        self.path = path
        epoch = meta["epochs"][0]
        self.layers = sorted(map(int, epoch["slot_map"]))
        self.counts = read_partial(path, len(self.layers), slots)
        if not len(self.counts):
            raise ConfigError(FIELD, str(path), "holds no iteration: nothing was recorded")
        first = epoch["first_iteration"]
        self.iterations = list(range(first, first + len(self.counts)))

    def read(self, iterations: range, layers: Sequence[int], out_NLG: Counts) -> None:
        first = iterations.start - self.iterations[0]
        out_NLG[:] = self.counts[first : first + len(iterations)]


def _open(path: Path, slots: int, meta: Mapping[str, Any]) -> _RankFile | _PartialFile:
    if path.suffix == ".partial":
        try:
            return _PartialFile(path, slots, meta)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(FIELD, str(path.parent / META), f"does not describe {path.name}: {error!r}") from error
    return _RankFile(path, slots)


def _common(ranks: Sequence[_RankFile | _PartialFile]) -> tuple[tuple[int, ...], int, int]:
    """(layers, first iteration, last + 1) of all ranks. After a kill some are an iteration ahead of others."""
    zero = ranks[0]
    killed = any(isinstance(rank, _PartialFile) for rank in ranks)
    for rank in ranks[1:]:
        if rank.layers != zero.layers:
            here, there = set(rank.layers), set(zero.layers)
            layer = min(here ^ there)
            path = rank.path if layer in there else zero.path
            raise ConfigError(FIELD, str(path), f"layer {layer} is missing; other ranks have it")
        same_end = killed or rank.iterations[-1] == zero.iterations[-1]
        if rank.iterations[0] != zero.iterations[0] or not same_end:
            spans = [f"{r.iterations[0]} to {r.iterations[-1]}" for r in (rank, zero)]
            raise ConfigError(FIELD, str(rank.path), f"holds iterations {spans[0]}, but {zero.path.name} {spans[1]}")
    return tuple(zero.layers), zero.iterations[0], min(rank.iterations[-1] for rank in ranks) + 1


def _epochs(
    folder: Path, meta: Mapping[str, Any], layers: Sequence[int], slots: int, ranks: int,
    slot_map: SlotMap | None, start: int,
) -> tuple[tuple[Epoch, ...], bool]:  # fmt: skip
    """What slots held, and whether experts were spread over the ranks at all. Raises ConfigError."""
    path = str(folder / META)
    if "epochs" not in meta:
        rows = slot_map or {layer: range(slots) for layer in layers}
        experts = 1 + max((expert for row in rows.values() for expert in row), default=0)
        placement = Placement.from_assignments(rows, layers, experts, slots, ranks)
        return (Epoch(start, placement),), True
    if slot_map is not None:
        raise ConfigError("slot_map", "(given)", f"{path} says what slots held; leave it out")
    experts = _positive(folder, meta, "num_logical_experts")
    try:
        spread = bool(meta["layout"]["enable_expert_parallel"])
        epochs = []
        for entry in meta["epochs"]:
            rows = {int(layer): [int(expert) for expert in row] for layer, row in entry["slot_map"].items()}
            placement = Placement.from_assignments(rows, layers, experts, slots, 1)
            fleet = Fleet(tuple(int(count) for count in entry["slots_by_rank"]))
            if fleet.num_slots != slots:
                raise ValueError(f"slots_by_rank counts {fleet.num_slots} slots of {slots}")
            epochs.append(Epoch(int(entry["first_iteration"]), Placement(placement.expert_LG, fleet, experts)))
        if not epochs:
            raise ValueError("epochs is empty")
    except ConfigError as error:
        raise ConfigError(FIELD, path, f"slot_map: {error.remedy} (found {error.value!r})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(FIELD, path, f"layout or epochs cannot be read: {error!r}") from error
    return tuple(epochs), spread
