"""`nonet eplb report` and `plan`: from recorded files to a table, a picture and the YAML that is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from nonet.cli.main import app
from nonet.eplb.placement import Placement
from nonet.eplb.recorded import Statistics
from nonet.eplb.recording import Recording, meta_info
from nonet.eplb.report import report
from nonet.eplb.statistics import read_statistics

EXPERTS, RANKS, LAYERS = 16, 4, (1, 2)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as left:
            app(["eplb", *map(str, arguments)])
        return left.value.code, *capsys.readouterr()

    return call


def record(folder: Path, placement: Placement, *, ep: bool = True, tokens: int = 400) -> Statistics:
    """Skewed tokens of four ranks in 20 iterations, as the engine would have sent them under a placement."""
    rng = np.random.default_rng(0)
    logical = np.empty((20, RANKS, len(LAYERS), EXPERTS), np.int32)
    for i in range(len(LAYERS)):
        weight = rng.permutation(1.0 / np.arange(1, EXPERTS + 1))
        logical[:, :, i] = rng.multinomial(tokens, weight / weight.sum(), size=(20, RANKS))
    plain = Placement.contiguous(len(LAYERS), EXPERTS, RANKS)
    told = meta_info(plain, LAYERS, 4, first_iteration=100, tp=1, dp=RANKS, ep=ep)
    _write(folder, logical, told)
    if placement.fleet.num_slots != EXPERTS:
        count = read_statistics(folder).replay(placement).count_NRLG
        _write(folder, count, meta_info(placement, LAYERS, 4, first_iteration=100, tp=1, dp=RANKS, ep=ep))
    return read_statistics(folder)


def _write(folder: Path, count_NRLG: np.ndarray, told: dict) -> None:
    for rank in range(RANKS):
        recording = Recording(folder, rank, RANKS, told)
        for count_LG in count_NRLG[:, rank]:
            recording.add(count_LG)
        recording.close()


PLAIN = Placement.contiguous(len(LAYERS), EXPERTS, RANKS)
REPLICAS = Placement.contiguous(len(LAYERS), EXPERTS, RANKS, 20)


# -- report -----------------------------------------------------------------------------------------------------------


def test_report_prints_the_table(cli, tmp_path):
    found = record(tmp_path, PLAIN)
    wanted = report(found.rank_load(), LAYERS).text()
    assert wanted.splitlines()[:2] == ["Load statistics:", wanted.splitlines()[1]]
    for flag in ("--expert_statistic_path", "--expert-statistic-path"):
        assert cli("report", flag, tmp_path) == (0, f"{wanted}\n", "")
    part = report(found.between(105, 110).rank_load(), LAYERS).text()
    assert part != wanted
    words = ["--iter_start", 105, "--iter_stop", 110]
    assert cli("report", "--expert_statistic_path", tmp_path, *words)[1] == f"{part}\n"


def test_report_by_slot_as_json_and_as_a_picture(cli, tmp_path):
    found = record(tmp_path, REPLICAS)
    words = ["--expert_statistic_path", tmp_path, "--per_expert", "--format", "json", "--plot", tmp_path / "a.svg"]
    code, out, err = cli("report", *words)
    assert (code, err) == (0, "")
    wanted = report(found.slot_load(), LAYERS, 100)
    assert json.loads(out)["average"]["imbalance_ratio"] == pytest.approx(wanted.imbalance_L.mean())
    assert json.loads(out)["iter_start"] == 100
    assert (tmp_path / "a.svg").read_text().startswith("<svg ")
    assert "20 slots, iterations 100 to 119" in (tmp_path / "a.svg").read_text()


def test_report_of_two_runs(cli, tmp_path):
    both = [tmp_path / "before", tmp_path / "after"]
    for folder, placement in zip(both, (PLAIN, REPLICAS), strict=True):
        record(folder, placement)
    words = [word for folder in both for word in ("--expert_statistic_path", folder)]
    code, out, err = cli("report", *words, "--plot", tmp_path / "both.svg")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if "Load" in line] == [f"{folder}: Load statistics:" for folder in both]
    assert cli("report", *words, "--format", "json")[1].count("expert_statistic_path") == 2


def test_report_of_what_was_not_spread(cli, tmp_path):
    """Without expert parallelism, or from a dump of all ranks together, ranks are only imagined."""
    record(tmp_path / "a", PLAIN, ep=False)
    code, out, err = cli("report", "--expert_statistic_path", tmp_path / "a")
    assert (code, err) == (0, f"note: {tmp_path / 'a'}: experts were not spread over ranks; shown as if over 4\n")
    np.save(tmp_path / "b.npy", read_statistics(tmp_path / "a").load())
    code, again, err = cli("report", "--expert_statistic_path", tmp_path / "b.npy", "--ep_size", 4)
    assert (code, err) == (0, "")
    figures = [line.split()[1:] for line in out.splitlines()]
    assert [line.split()[1:] for line in again.splitlines()] == figures
    code, out, err = cli("report", "--expert_statistic_path", tmp_path / "b.npy")
    assert (code, out) == (2, "")
    assert (
        err
        == "error: ranks = 1: there is nothing to compare; use --per_expert, or --ep_size for ranks as they could be\n"
    )


# -- plan -------------------------------------------------------------------------------------------------------------


def planned(cli, tmp_path, *words: object, policy: str = "trtllm") -> tuple[dict, dict]:
    """(the YAML, the figures)"""
    out = tmp_path / "moe_load_balancer.yaml"
    words = ("--output_path", out, "--policy", policy, "--format", "json", *words)
    code, printed, err = cli("plan", "--expert_statistic_path", tmp_path / "recorded", *words)
    assert (code, err) == (0, "")
    return yaml.safe_load(out.read_text()), json.loads(printed)


def imbalance_of(found: Statistics, tree: dict, ranks: int) -> float:
    slots = tree["num_slots"]
    placement = Placement.from_assignments(tree["initial_global_assignments"], LAYERS, EXPERTS, slots, ranks)
    return float(report(found.replay(placement).rank_load(), LAYERS).imbalance_L.mean())


@pytest.mark.parametrize("policy", ["trtllm", "deepseek", "nonet", "default"])
def test_plan_writes_a_balanced_placement(cli, tmp_path, policy):
    found = record(tmp_path / "recorded", PLAIN)
    tree, figures = planned(cli, tmp_path, "--num_slots", 20, policy=policy)
    assert list(tree) == ["initial_global_assignments", "num_slots", "layer_updates_per_iter"]
    assert (tree["num_slots"], tree["layer_updates_per_iter"]) == (20, 0)
    assert list(tree["initial_global_assignments"]) == list(LAYERS)
    average = figures["average"]
    assert average["recorded"] == pytest.approx(report(found.rank_load(), LAYERS).imbalance_L.mean())
    assert average["predicted"] == pytest.approx(imbalance_of(found, tree, RANKS))
    assert average["predicted"] < 0.25 * average["recorded"]
    assert 0 <= average["bound"] <= average["planned"] <= 0.05
    assert average["gap"] == pytest.approx(average["planned"] - average["bound"], abs=1e-9)


def test_plan_prints_a_table_and_says_in_the_file_where_it_comes_from(cli, tmp_path):
    record(tmp_path / "recorded", PLAIN)
    out = tmp_path / "p.yaml"
    words = ["--expert_statistic_path", tmp_path / "recorded", "--output_path", out, "--num-slots", 20]
    code, printed, err = cli("plan", *words, "--policy", "trtllm", "--layer_updates_per_iter", 2, "--iter_stop", 110)
    assert (code, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == (
        "nonet eplb plan: policy trtllm, dispatch even, 16 experts in 20 slots on 4 ranks, from iterations 100 to 109"
    )
    assert lines[2].split() == ["recorded", "predicted", "planned", "bound", "gap"]
    assert [line.split()[0] for line in lines[3:-1]] == ["1", "2", "average"]
    assert lines[-1] == f"written to {out}"
    text = out.read_text()
    assert text.startswith(f"# {lines[0]}\n# {lines[1]}\ninitial_global_assignments:\n  1: [")
    assert yaml.safe_load(text)["layer_updates_per_iter"] == 2


def test_planning_again_from_a_run_with_replicas_sees_the_same_experts(cli, tmp_path):
    record(tmp_path / "recorded", PLAIN)
    first, _ = planned(cli, tmp_path, "--num_slots", 20)
    rows = first["initial_global_assignments"]
    record(tmp_path / "recorded", Placement.from_assignments(rows, LAYERS, EXPERTS, 20, RANKS))
    again, figures = planned(cli, tmp_path)
    assert again == first, "slots and ranks are those of the run unless others are asked for"
    assert figures["average"]["recorded"] == pytest.approx(figures["average"]["predicted"])


def test_other_ranks_and_slots(cli, tmp_path):
    found = record(tmp_path / "recorded", PLAIN)
    tree, figures = planned(cli, tmp_path, "--ep_size", 6, "--slots-per-rank", 4)
    assert tree["num_slots"] == 24
    assert figures["average"]["predicted"] == pytest.approx(imbalance_of(found, tree, 6))
    tree, _ = planned(cli, tmp_path, "--ep_size", 8, "--num_slots", 24, "--nodes", 2, policy="deepseek")
    assert len(tree["initial_global_assignments"][1]) == 24
    tree, _ = planned(cli, tmp_path, "--ep_size", 3)
    assert tree["num_slots"] == 16, "a slot an expert need not divide: nonet serves it as it is"


def test_groups_of_experts_stay_on_a_node(cli, tmp_path):
    """Slots 0 to 11 are the first node's: with groups, DeepSeek's policy puts no group on both."""
    record(tmp_path / "recorded", PLAIN)

    def split(*more: object) -> int:
        words = ("--ep_size", 4, "--num_slots", 24, "--nodes", 2, *more)
        rows = planned(cli, tmp_path, *words, policy="deepseek")[0]["initial_global_assignments"].values()
        return sum(len({e // 4 for e in row[:12]} & {e // 4 for e in row[12:]}) for row in rows)

    assert split("--num_groups", 4) == 0
    assert split() > 0


def test_a_plan_for_shares_by_load_predicts_their_imbalance(cli, tmp_path):
    record(tmp_path / "recorded", PLAIN)
    even, filled = (
        planned(cli, tmp_path, "--num_slots", 20, "--dispatch", rule, *more, policy="nonet")[1]["average"]
        for rule, more in (("even", ("--sum",)), ("waterfill", ()))
    )
    assert filled["predicted"] < 0.5 * even["predicted"]
    assert "# serve it with replica_dispatch: waterfill\n" in (tmp_path / "moe_load_balancer.yaml").read_text()


def test_planning_from_the_current_placement_moves_few(cli, tmp_path):
    record(tmp_path / "recorded", PLAIN)
    first, figures = planned(cli, tmp_path, "--num_slots", 20, "--iter_stop", 110, policy="nonet")
    assert "moves" not in figures["average"]
    current = tmp_path / "current.yaml"
    current.write_text((tmp_path / "moe_load_balancer.yaml").read_text())
    words = ("--num_slots", 20, "--iter_start", 110, "--current", current)
    again, figures = planned(cli, tmp_path, *words, "--max_moves", 1, policy="nonet")
    assert all(layer["moves"] <= 1 for layer in figures["layers"].values())
    still, figures = planned(cli, tmp_path, *words, "--max_moves", 0, policy="nonet")
    assert still == first
    assert figures["average"]["moves"] == 0


def test_tensorrt_llms_statistics_of_a_run_with_a_balancer(cli, tmp_path):
    """They count slots; --slot_map says what the slots held."""
    record(tmp_path / "recorded", REPLICAS)
    wanted, _ = planned(cli, tmp_path)
    meta = tmp_path / "recorded" / "meta_info.json"
    meta.write_text(json.dumps({"num_experts": 20, "num_experts_per_token": 4}))
    rows = {layer: row.tolist() for layer, row in zip(LAYERS, REPLICAS.expert_LG, strict=True)}
    (tmp_path / "served.yaml").write_text(yaml.safe_dump({"num_slots": 20, "initial_global_assignments": rows}))
    assert planned(cli, tmp_path, "--slot_map", tmp_path / "served.yaml")[0] == wanted
    other, _ = planned(cli, tmp_path)
    assert max(other["initial_global_assignments"][1]) == 19, "without it a slot is an expert"


# -- mistakes ---------------------------------------------------------------------------------------------------------


MISTAKES = {
    "--num_slots 12": "--num_slots = 12: there are 16 experts, and each needs a slot; use 16 or more",
    "--num_slots 18": "--num_slots = 18: over 4 ranks it does not divide, and successive slots share a rank; nearest: "
    "16 or 20",
    "--num_slots 17 --ep_size 3": "--num_slots = 17: over 3 ranks it does not divide, and successive slots share a "
    "rank; nearest: 18",
    "--num_slots 20 --slots_per_rank 6": "--num_slots = 20: --slots_per_rank 6 on 4 ranks is 24; give one of the two",
    "--ep_size 17": "--ep_size = 17: each rank needs a slot; use at most 16",
    "--nodes 3": "--nodes = 3: 4 ranks do not divide over them",
    "--policy nonett": "policy = 'nonett': did you mean 'nonet'?",
    "--dispatch evn": "dispatch = 'evn': ",
    "--num_slots 20 --current none.yaml": "--current = 'none.yaml': cannot be read: No such file or directory",
    "--num_slots 20 --current list.yaml": "--current = 'list.yaml': must hold a mapping with initial_global_",
    "--num_slots 20 --current bad.yaml": "--current = 'bad.yaml': is not YAML: ",
    "--num_slots 20 --current key.yaml": "--current = 'key.yaml': key 'numslots' is unknown; did you mean 'num_slots'?",
    "--num_slots 20 --current kind.yaml": "--current = 'kind.yaml': num_slots = 'x': input should be a valid integer",
    "--num_slots 20 --current empty.yaml": "--current = 'empty.yaml': holds no initial_global_assignments",
    "--num_slots 20 --current other.yaml": "initial_global_assignments = [1]: layer 2 is missing; give every MoE layer",
    "--iter_start 200": "iter_start = 200: iterations 100 to 119 are recorded",
    "--output_path none/out.yaml": "--output_path = 'none/out.yaml': cannot be written: No such file or directory",
    "--num_slot 20": "No such option: --num_slot (Possible options: ",
    "--num_slots many": "Invalid value for '--num_slots': ",
}


@pytest.mark.parametrize(("words", "line"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(cli, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "recorded", PLAIN)
    for name, text in {
        "list.yaml": "[]", "bad.yaml": "a: [", "key.yaml": "numslots: 3", "kind.yaml": "num_slots: x",
        "empty.yaml": "num_slots: 20", "other.yaml": f"initial_global_assignments: {{1: {[*range(16), 0, 1, 2, 3]}}}",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    output = [] if "--output_path" in words else ["--output_path", "out.yaml"]
    code, out, err = cli("plan", "--expert_statistic_path", "recorded", *output, *words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.yaml").exists()


def test_mistakes_of_the_report(cli, tmp_path):
    record(tmp_path / "a", PLAIN)
    words = ["--expert_statistic_path", tmp_path / "a"]
    assert cli("report", *words, "--plot", "a.png") == (
        2, "", "error: --plot = 'a.png': only SVG is drawn; use a name that ends in .svg\n",
    )  # fmt: skip
    assert cli("report")[2] == "error: Missing option '--expert_statistic_path'.\n"
    code, out, err = cli("report", "--expert_statistic_path", tmp_path)
    assert (code, out) == (2, "")
    missing = f"expert_statistic_path = '{tmp_path}': holds no meta_info.json; give the folder that a recording wrote"
    assert err == f"error: {missing}\n"
