"""Files of statistics: written and read back, TensorRT-LLM's and SGLang's read, broken ones refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nonet.cli.eplb_files import load_statistics
from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.eplb.recorded import Epoch, Statistics
from nonet.eplb.recording import Recording, meta_info
from nonet.eplb.report import report
from nonet.eplb.statistics import read_statistics
from nonet.errors import ConfigError

LAYERS = (1, 3)
PLACEMENT = Placement(np.array([[0, 1, 2, 0, 3, 3], [3, 2, 1, 0, 0, 1]], np.int32), Fleet.even(2, 6), 4)


def counts(seed: int = 0, iterations: int = 3) -> np.ndarray:
    """[N, R, L, G]"""
    return np.random.default_rng(seed).integers(0, 50, (iterations, 2, 2, 6), dtype=np.int32)


def meta(first: int = 10) -> dict:
    return meta_info(PLACEMENT, LAYERS, 2, first_iteration=first, tp=1, dp=2, ep=True)


def record(folder: Path, count_NRLG: np.ndarray, *, killed: bool = False) -> None:
    for rank in range(2):
        recording = Recording(folder, rank, 2, meta())
        for count_LG in count_NRLG[:, rank]:
            recording.add(count_LG)
        as_it_is = (folder / f"rank{rank}.partial").read_bytes()
        recording.close()
        if killed:
            (folder / f"rank{rank}.safetensors").unlink()
            (folder / f"rank{rank}.partial").write_bytes(as_it_is)


def refused(path: Path, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        load_statistics(path, *arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path}/", "").replace(str(path), "DIR")


def test_what_is_written_is_read(tmp_path):
    count = counts()
    record(tmp_path, count)
    found = read_statistics(tmp_path)
    assert (found.count_NRLG == count).all()
    assert found.count_NRLG.dtype == np.int32
    assert (found.layers, found.first_iteration, found.num_iterations) == (LAYERS, 10, 3)
    assert (found.num_ranks, found.num_experts, found.top_k, found.spread) == (2, 4, 2, True)
    assert (found.placement.expert_LG == PLACEMENT.expert_LG).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta_info.json", "rank0.safetensors", "rank1.safetensors",
    ]  # fmt: skip


def test_the_files_are_those_that_tensorrt_llm_reads(tmp_path):
    """Its readers take num_experts for the width of every array, and sum over the files they find."""
    count = counts()
    record(tmp_path, count)
    told = json.loads((tmp_path / "meta_info.json").read_text())
    assert (told["num_experts"], told["num_experts_per_token"], told["num_logical_experts"]) == (6, 2, 4)
    arrays = load_file(tmp_path / "rank1.safetensors")
    assert set(arrays) == {f"{n}_{layer}" for n in (10, 11, 12) for layer in LAYERS}
    assert all(array.dtype == np.int32 and array.shape == (6,) for array in arrays.values())
    assert arrays["11_3"].tolist() == count[1, 1, 1].tolist()
    mode = (tmp_path / "rank0.safetensors").stat().st_mode & 0o777
    assert mode == (tmp_path / "meta_info.json").stat().st_mode & 0o777, "as readable as any other file"


def test_the_table_is_what_tensorrt_llms_tool_computes_from_them(tmp_path):
    """Its report: counts of all files added up, [iterations, ranks, slots of a rank], ranks compared by iteration."""
    record(tmp_path, counts())
    told = json.loads((tmp_path / "meta_info.json").read_text())
    files = [load_file(path) for path in sorted(tmp_path.glob("rank*.safetensors"))]
    found = report(read_statistics(tmp_path).rank_load(), LAYERS)
    for i, layer in enumerate(LAYERS):
        summed = np.stack([sum(file[f"{n}_{layer}"] for file in files) for n in (10, 11, 12)]).astype(float)
        ranks = summed.reshape(3, len(files), told["num_experts"] // len(files)).sum(-1)
        assert found.mean_L[i] == pytest.approx(ranks.mean())
        assert found.std_L[i] == pytest.approx(ranks.std(axis=-1, ddof=1).mean())
        assert found.imbalance_L[i] == pytest.approx((ranks.max(-1) / ranks.mean(-1) - 1).mean())


def test_a_part_of_the_iterations(tmp_path):
    count = counts()
    record(tmp_path, count)
    for path_part in (read_statistics(tmp_path, 11, 13), read_statistics(tmp_path).between(11, None)):
        assert (path_part.first_iteration, path_part.num_iterations) == (11, 2)
        assert (path_part.count_NRLG == count[1:]).all()
    assert refused(tmp_path, 9) == "iter_start = 9: iterations 10 to 12 are recorded"
    assert refused(tmp_path, 13) == "iter_start = 13: iterations 10 to 12 are recorded"
    assert refused(tmp_path, 11, 11) == "iter_stop = 11: use 12 to 13: iterations 10 to 12 are recorded"
    assert refused(tmp_path, None, 14) == "iter_stop = 14: use 11 to 13: iterations 10 to 12 are recorded"


def test_a_run_that_was_killed(tmp_path):
    """Ranks may be an iteration apart, and one may have been cut off while it wrote."""
    count = counts()
    record(tmp_path, count, killed=True)
    partial = tmp_path / "rank1.partial"
    partial.write_bytes(partial.read_bytes()[:-5])
    found = read_statistics(tmp_path)
    assert (found.count_NRLG == count[:2]).all()
    assert found.first_iteration == 10


def test_another_run_in_the_same_folder_replaces_it(tmp_path):
    record(tmp_path, counts())
    (tmp_path / "rank7.safetensors").write_text("of a larger run")
    (tmp_path / "notes.txt").write_text("not ours")
    record(tmp_path, counts(1, iterations=1))
    assert (read_statistics(tmp_path).count_NRLG == counts(1, iterations=1)).all()
    assert (tmp_path / "notes.txt").exists()


def test_a_recording_without_iterations_leaves_no_counts(tmp_path):
    record(tmp_path, counts(iterations=0))
    assert refused(tmp_path) == "expert_statistic_path = 'DIR': holds no rank0.safetensors: nothing is recorded yet"


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_slots_fold_back_to_experts(tmp_path):
    count = counts()
    record(tmp_path, count)
    found = read_statistics(tmp_path)
    logical = found.logical()
    for layer in range(2):
        for expert in range(4):
            own = PLACEMENT.expert_LG[layer] == expert
            assert (logical[:, :, layer, expert] == count[:, :, layer, own].sum(axis=-1)).all()
    assert (found.load() == logical.sum(axis=1)).all()
    assert (found.rank_load() == count.sum(axis=1).reshape(3, 2, 2, 3).sum(axis=-1)).all()


def test_epochs_fold_each_with_its_own_map():
    count = counts()
    other = Placement(PLACEMENT.expert_LG[:, ::-1].copy(), Fleet((4, 2)), 4)
    found = Statistics(count, LAYERS, 10, (Epoch(10, PLACEMENT), Epoch(12, other)))
    flipped = Statistics(count[2:, ..., ::-1].copy(), LAYERS, 12, (Epoch(12, PLACEMENT),))
    assert (found.logical()[2:] == flipped.logical()).all()
    assert (found.logical()[:2] == found.between(10, 12).logical()).all()
    assert found.rank_load()[2, 0].tolist() == [count[2, :, 0, :4].sum(), count[2, :, 0, 4:].sum()]
    assert found.placement is other


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_replay_sends_tokens_as_the_lookup_does(data):
    """Against the lookup of the MoE layers, token by token."""
    import torch

    from nonet.moe.lookup import Even

    experts, ranks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    slots = experts + data.draw(st.integers(0, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    row = rng.permutation([*range(experts), *rng.integers(0, experts, slots - experts)]).astype(np.int32)
    placement = Placement(row[None], Fleet.even(ranks, slots), experts)
    tokens = [torch.from_numpy(rng.integers(0, experts, (data.draw(st.integers(0, 40)), 2))) for _ in range(ranks)]
    wanted = [
        np.bincount(Even(placement, 0, rank, torch.device("cpu"))(own).reshape(-1).numpy(), minlength=slots)
        for rank, own in enumerate(tokens)
    ]
    logical = np.array([np.bincount(own.reshape(-1).numpy(), minlength=experts) for own in tokens], np.int32)
    plain = Placement.contiguous(1, experts, 1)
    recorded = Statistics(logical[None, :, None], (0,), 0, (Epoch(0, plain),))
    assert recorded.replay(placement).count_NRLG[0, :, 0].tolist() == np.array(wanted).tolist()


def test_replay_needs_the_same_model():
    recorded = Statistics(counts(), LAYERS, 0, (Epoch(0, PLACEMENT),))
    with pytest.raises(ConfigError, match="placement = '2 layers of 5 experts': the statistics are of 2 layers of 4"):
        recorded.replay(Placement.contiguous(2, 5, 2))


# -- others' files ----------------------------------------------------------------------------------------------------


def tensorrt_llm(folder: Path, count_NRLG: np.ndarray, layers=LAYERS) -> Path:
    """As its expert_statistic.py writes them: two keys, one file a rank."""
    folder.mkdir()
    told = {"num_experts": count_NRLG.shape[-1], "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(told))
    for rank in range(count_NRLG.shape[1]):
        arrays = {
            f"{100 + n}_{layer}": count_NRLG[n, rank, i].copy()
            for n in range(len(count_NRLG))
            for i, layer in enumerate(layers)
        }
        save_file(arrays, folder / f"rank{rank}.safetensors")
    return folder


def test_tensorrt_llms_own(tmp_path):
    count = counts()
    found = read_statistics(tensorrt_llm(tmp_path / "theirs", count))
    assert (found.count_NRLG == count).all()
    assert (found.layers, found.first_iteration, found.num_experts, found.top_k) == (LAYERS, 100, 6, 2)
    assert found.placement.fleet.slots_by_rank == (3, 3), "as many ranks as files"
    assert (found.logical() == count).all()


def test_tensorrt_llms_own_of_a_run_with_a_balancer(tmp_path):
    """It counts slots and does not say what they held; the YAML of that run does."""
    folder = tensorrt_llm(tmp_path / "theirs", counts())
    rows = dict(zip(LAYERS, PLACEMENT.expert_LG.tolist(), strict=True))
    found = read_statistics(folder, slot_map=rows)
    assert found.num_experts == 4
    assert (found.logical() == Statistics(counts(), LAYERS, 0, (Epoch(0, PLACEMENT),)).logical()).all()
    record(tmp_path / "ours", counts())
    assert refused(tmp_path / "ours", slot_map=rows).startswith("slot_map = '(given)': meta_info.json says what slots")


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "pt"])
def test_sglangs_recorder(tmp_path, kind):
    """[steps, layers, experts] of all ranks; its first layer is dense and counts nothing."""
    count = np.random.default_rng(0).integers(0, 9, (4, 3, 6))
    count[:, 0] = 0
    path = tmp_path / f"expert_distribution_recorder.{kind}"
    if kind == "npy":
        np.save(path, count)
    elif kind == "npz":
        np.savez(path, logical_count=count)
    elif kind == "safetensors":
        save_file({"logical_count": count}, path)
    else:
        import torch

        torch.save({"rank": 0, "logical_count": torch.from_numpy(count), "average_utilization_rate": 0.5}, path)
    found = load_statistics(path)
    assert (found.load() == count[:, 1:]).all()
    assert (found.layers, found.num_iterations, found.num_ranks, found.spread) == ((1, 2), 4, 1, False)
    assert load_statistics(path, 1, 3).num_iterations == 2
    assert found.spread_over(3).rank_load().tolist() == count[:, 1:].reshape(4, 2, 3, 2).sum(-1).tolist()
    assert refused(path, 0, 5) == "iter_stop = 5: use 1 to 4: iterations 0 to 3 are recorded"


# -- broken -----------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def with_meta(**changes):
    def change(folder: Path) -> None:
        (folder / "meta_info.json").write_text(json.dumps({**meta(), **changes}))

    return change


def without(*keys: str, rank: int = 0):
    def change(folder: Path) -> None:
        rewrite(folder / f"rank{rank}.safetensors", lambda arrays: [arrays.pop(key) for key in keys])

    return change


def other(rank: int = 1, **arrays):
    return lambda folder: rewrite(folder / f"rank{rank}.safetensors", lambda found: found.update(arrays))


def slot_map(layer: str, row: list[int]):
    told = meta()
    told["epochs"][0]["slot_map"][layer] = row
    return with_meta(epochs=told["epochs"])


BROKEN = [
    (
        lambda d: (d / "meta_info.json").unlink(),
        "'DIR': holds no meta_info.json; give the folder that a recording wrote",
    ),
    (lambda d: (d / "meta_info.json").write_text("{"), "'meta_info.json': is not JSON: Expecting property name"),
    (lambda d: (d / "meta_info.json").write_bytes(b"\xff"), "'meta_info.json': is not JSON: 'utf-8' codec"),
    (lambda d: (d / "meta_info.json").write_text("[]"), "'meta_info.json': must hold a JSON mapping with num_experts"),
    (with_meta(num_experts="6"), "'meta_info.json': num_experts = '6'; must be a positive count"),
    (with_meta(num_experts=5), "'rank0.safetensors': '10_1' is int32 [6]; expected int32 [5]"),
    (with_meta(num_experts_per_token=0), "'meta_info.json': num_experts_per_token = 0; must be a positive count"),
    (with_meta(num_logical_experts=None), "'meta_info.json': num_logical_experts = None; must be a positive count"),
    (with_meta(layout={}), "'meta_info.json': tensor_parallel_size = None; must be a positive count"),
    (with_meta(epochs=[]), "'meta_info.json': layout or epochs cannot be read: ValueError('epochs is empty')"),
    (with_meta(epochs=7), "'meta_info.json': layout or epochs cannot be read: TypeError("),
    (slot_map("1", [0, 1, 2]), "'meta_info.json': slot_map: layer 1 must name an expert for each of 6 slots (found 3)"),
    (slot_map("1", [0, 1, 2, 9, 3, 3]), "'meta_info.json': slot_map: layer 1: experts are 0 to 3 (found 9)"),
    (
        slot_map("1", [0] * 6),
        "'meta_info.json': slot_map: layer 1: this expert has no slot; every expert needs one (fo",
    ),
    (slot_map("x", []), "'meta_info.json': layout or epochs cannot be read: ValueError("),
    (lambda d: (d / "rank1.safetensors").unlink(), "'rank1.safetensors': is missing; there are 2 ranks"),
    (lambda d: (d / "rank0.safetensors").unlink(), "'rank0.safetensors': is missing; there are 2 ranks"),
    (
        lambda d: (d / "rank4.safetensors").write_text(""),
        "'rank4.safetensors': is not of this run, which had 2 ranks; ",
    ),
    (
        lambda d: (d / "rank1.safetensors").write_bytes(b"12345678"),
        "'rank1.safetensors': cannot be read (truncated?): ",
    ),
    (lambda d: save_file({}, d / "rank1.safetensors"), "'rank1.safetensors': holds no iteration: nothing was recorded"),
    (other(extra=np.zeros(6, np.int32)), "'rank1.safetensors': key 'extra' is not ITERATION_LAYER, as in 100_3"),
    (other(**{"11_3": np.zeros(7, np.int32)}), "'rank1.safetensors': '11_3' is int32 [7]; expected int32 [6]"),
    (other(**{"11_3": np.zeros(6, np.float32)}), "'rank1.safetensors': '11_3' is float32 [6]; expected int32 [6]"),
    (other(**{"11_3": np.full(6, -1, np.int32)}), "'rank1.safetensors': holds a negative count"),
    (without("11_1", "11_3"), "'rank0.safetensors': iteration 11 is missing; there are 10 to 12"),
    (without("11_3", rank=1), "'rank1.safetensors': layer 3 of iteration 11 is missing"),
    (without("10_3", "11_3", "12_3", rank=1), "'rank1.safetensors': layer 3 is missing; other ranks have it"),
    (without("10_3", "11_3", "12_3", rank=0), "'rank0.safetensors': layer 3 is missing; other ranks have it"),
    (without("12_1", "12_3", rank=1), "'rank1.safetensors': holds iterations 10 to 11, but rank0.safetensors 10 to 12"),
]


@pytest.mark.parametrize(("change", "line"), BROKEN, ids=[line for _, line in BROKEN])
def test_broken_statistics_are_one_line(tmp_path, change, line):
    record(tmp_path, counts())
    change(tmp_path)
    assert refused(tmp_path).startswith(f"expert_statistic_path = {line}")


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.npy", np.zeros((2, 3, 4, 5)), "logical_count has shape [2, 3, 4, 5]; expected [steps, layers, experts]"),
        ("a.npy", np.full((2, 3, 4), 0.5), "logical_count holds values that are no counts of tokens"),
        ("a.npy", np.full((2, 3, 4), np.nan), "logical_count holds values that are no counts of tokens"),
        ("a.npy", np.full((2, 3, 4), -1), "logical_count holds values that are no counts of tokens"),
        ("a.npy", np.full((2, 3, 4), 2**40), "logical_count holds a count of more than 31 bits"),
        ("a.npy", np.zeros((2, 3, 4)), "logical_count is zero everywhere: nothing was recorded"),
        ("a.npy", np.array(["a"]), "logical_count has shape [1]; expected [steps, layers, experts]"),
        ("a.npy", b"", "holds no array logical_count that can be read: "),
        ("a.npz", b"PK", "holds no array logical_count that can be read: "),
        ("a.safetensors", b"", "holds no array logical_count that can be read: "),
        ("a.pt", b"no", "is no dump of tensors that can be read: "),
        ("a.txt", b"", "is neither a folder of statistics nor one of .npy, .npz, .safetensors, .pt"),
    ],
    ids=str,
)
def test_arrays_that_are_none(tmp_path, name, data, line):
    path = tmp_path / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        np.save(path, data)
    assert refused(path).startswith(f"expert_statistic_path = 'DIR': {line}")


def test_dumps_without_the_counts(tmp_path):
    import torch

    np.savez(tmp_path / "a.npz", counts=np.ones(3))
    assert "holds no array logical_count that can be read: " in refused(tmp_path / "a.npz")
    torch.save({"records": []}, tmp_path / "a.pt")
    assert refused(tmp_path / "a.pt").endswith("holds no logical_count; record with the mode stat")
    assert refused(tmp_path / "none").endswith("no such folder; give the one that a recording wrote")
    np.save(tmp_path / "b.npy", np.ones((2, 3, 4)))
    rows = {0: [0]}
    assert (
        refused(tmp_path / "b.npy", slot_map=rows)
        == "slot_map = '(given)': b.npy counts experts, not slots; leave it out"
    )


def test_spread_over_needs_a_slot_a_rank():
    recorded = Statistics(counts(), LAYERS, 0, (Epoch(0, PLACEMENT),))
    with pytest.raises(ConfigError, match="ep_size = 7: use 1 to 6: each rank needs one of the 6 slots"):
        recorded.spread_over(7)
