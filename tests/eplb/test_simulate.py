"""Replaying loads: by hand, against the engine's lookup to the token, and the balance that rules reach."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nonet.cli import eplb_simulate
from nonet.cli.main import app
from nonet.config.fleet import Fleet
from nonet.eplb import sources, synthetic
from nonet.eplb.dispatch import Replicas
from nonet.eplb.placement import Placement
from nonet.eplb.simulate import RULES, Options, simulate
from nonet.eplb.workload import MadeUp, Recorded
from nonet.errors import ConfigError
from nonet.moe.lookup import Even


def test_by_hand():
    """Three steps on two ranks; expert 0 has a replica on each, so only experts 1 and 2 make a difference."""
    placement = Placement(np.array([[0, 1, 0, 2]], dtype=np.int32), Fleet.even(2, 4), 3)
    load = np.array([[[20, 10, 10]], [[20, 20, 10]], [[0, 0, 0]]])
    by_source = np.stack([load // 2, load - load // 2], axis=1)
    found = simulate(load, placement.fleet, Options(policy="none"), load_NRLE=by_source, placement=placement)
    assert found.imbalance_NL.tolist() == [[0.0], [0.2], [0.0]]
    filled = simulate(load, placement.fleet, Options(policy="none", dispatch="waterfill"), placement=placement)
    assert filled.imbalance_NL.tolist() == [[0.0], [0.0], [0.0]]
    assert found.summary()["balancedness"] == pytest.approx((1 + 1 / 1.2 + 1) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_even_is_the_engines_rule_to_the_token(seed):
    """Random tokens of four ranks through the lookup of the MoE layers: the same imbalance in every step and layer."""
    rng = np.random.default_rng(seed)
    steps, ranks, layers, experts, slots = 4, 4, 3, 12, 18
    rows = [np.append(rng.permutation(experts), rng.integers(0, experts, slots - experts)) for _ in range(layers)]
    placement = Placement(np.array(rows, dtype=np.int32), Fleet.even(ranks, slots), experts)
    by_source = np.zeros((steps, ranks, layers, experts), np.int64)
    wanted = np.zeros((steps, layers))
    for n, layer in np.ndindex(steps, layers):
        slot_load = np.zeros(slots)
        for rank in range(ranks):
            expert_TK = torch.from_numpy(rng.integers(0, experts, (int(rng.integers(0, 40)), 2)))
            by_source[n, rank, layer] = np.bincount(expert_TK.numpy().reshape(-1), minlength=experts)
            slot_TK = Even(placement, layer, rank, torch.device("cpu")).reference(expert_TK)
            slot_load += np.bincount(slot_TK.numpy().reshape(-1), minlength=slots)
        load_R = np.bincount(placement.rank_of_slot(), weights=slot_load)
        wanted[n, layer] = load_R.max() / load_R.mean() - 1
    found = simulate(by_source.sum(axis=1), placement.fleet, Options(), load_NRLE=by_source, placement=placement)
    np.testing.assert_allclose(found.imbalance_NL, wanted, atol=1e-12)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rule_loses_a_token(rule):
    """Mean load of a rank is the same under every rule, so is the hottest of a placement that leaves no choice."""
    load = synthetic.tokens(iter([synthetic.popularity("zipf", 2, 16, 0)] * 3), 3, 4000, 0)
    fleet = Fleet.even(4, 16)
    found = simulate(load, fleet, Options(policy="none", dispatch=rule))
    load_NLR = load.reshape(3, 2, 4, 4).sum(axis=3)
    np.testing.assert_allclose(found.imbalance_NL, load_NLR.max(axis=2) / load_NLR.mean(axis=2) - 1)
    if rule in sources.RULES:
        replicas = Replicas.of(Placement.contiguous(2, 16, 4, 24))
        sums_LG = sources.slot_sums(rule, load[0], replicas, seed=1)
        row = replicas.placement.expert_LG[0]
        for layer in range(2):
            assert (np.bincount(row, weights=sums_LG[layer]) == load[0, layer]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_rules_rank_as_they_should(seed):
    """32 ranks, one spare slot each, 256 experts, load as published for DeepSeek-R1 (0.109 with DeepSeek's planner)."""
    work = MadeUp("calibrated", num_steps=70, num_layers=6, seed=seed)
    load, _ = work.steps(32)
    fleet, reached = Fleet.even(32, 288), {}
    for policy, rule in [
        ("none", "even"), ("deepseek", "even"), ("deepseek", "hashed"), ("deepseek", "optimal"), ("nonet", "even"),
        ("nonet", "waterfill"), ("nonet", "waterfill-average"), ("nonet", "optimal"),
    ]:  # fmt: skip
        found = simulate(load, fleet, Options(policy, rule, plan_steps=60, seed=seed))
        reached[policy, rule] = found.summary()["imbalance_mean"]
    assert reached["none", "even"] > 1
    assert 0.08 < reached["deepseek", "even"] < 0.14
    assert reached["deepseek", "even"] < reached["deepseek", "hashed"] + 0.002
    assert reached["nonet", "even"] < 1.05 * reached["deepseek", "even"]
    assert reached["nonet", "waterfill-average"] < reached["nonet", "even"]
    assert reached["nonet", "waterfill"] < 0.015
    assert reached["nonet", "waterfill"] < 0.4 * reached["deepseek", "optimal"]
    assert reached["nonet", "optimal"] <= reached["nonet", "waterfill"] < reached["nonet", "optimal"] + 0.002


def test_planning_again_follows_the_load():
    """Popularity turns around after half of the steps: who plans again has it back, within the cap of moves."""
    share = synthetic.popularity("lognormal:1.2", 2, 64, 0)
    shares = [share] * 40 + [share[:, ::-1]] * 60
    load = synthetic.tokens(iter(shares), 100, 64_000, 0)
    fleet = Fleet.even(8, 72)
    never = simulate(load, fleet, Options(plan_steps=20))
    again = simulate(load, fleet, Options(plan_steps=20, rebalance_every=10))
    capped = simulate(load, fleet, Options(plan_steps=20, rebalance_every=10, max_moves=3))
    assert again.imbalance_NL[-10:].mean() < 0.5 * never.imbalance_NL[-10:].mean()
    assert len(again.moves) == len(capped.moves) == 8
    assert max(capped.moves[1:]) <= 3 * 2
    assert never.moves[0] == 2 * 72


def test_seeds_make_the_same_again():
    load, _ = MadeUp("r1like", 6, 2, 32, tokens_per_rank=100).steps(4)
    once = simulate(load, Fleet.even(4, 40), Options(seed=5)).imbalance_NL
    assert (simulate(load, Fleet.even(4, 40), Options(seed=5)).imbalance_NL == once).all()
    assert (simulate(load, Fleet.even(4, 40), Options(seed=6)).imbalance_NL != once).any()


def test_speeds_and_dead_ranks_count():
    load, _ = MadeUp("uniform", 8, 2, 32, tokens_per_rank=500).steps(4)
    fleet = Fleet((24, 12, 12, 12), speed_of_rank=(2.0, 1.0, 1.0, 1.0), dead_ranks=frozenset({3}))
    found = simulate(load, fleet, Options(dispatch="waterfill"))
    assert found.imbalance_NL.max() < 0.05


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dispatch": "evn"}, "dispatch"),
        ({"plan_steps": 6}, "plan_steps"),
        ({"rebalance_every": -1}, "rebalance_every"),
        ({"policy": "nonett"}, "policy"),
        ({"sweeps": 0}, "sweeps"),
    ],
)
def test_wrong_options_are_refused(options, field):
    with pytest.raises(ConfigError) as caught:
        simulate(np.ones((6, 1, 8), np.int64), Fleet.even(2, 8), Options(**options))
    assert caught.value.field == field


def test_recorded_loads_keep_their_sources_or_are_drawn_anew():
    from nonet.eplb.statistics import from_logical_count

    count = np.random.default_rng(0).integers(1, 50, (5, 3, 16))
    statistics = from_logical_count(count, "made up")
    total, by_source = Recorded(statistics).steps(4)
    assert by_source is None
    assert (total == count).all()
    assert Recorded(statistics).steps(1)[1] is not None
    drawn, _ = Recorded(statistics, tokens_per_rank=200).steps(8)
    assert (drawn.sum(axis=2) == 1600).all()


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_json(capsys):
    eplb_simulate.simulate(
        load="r1like:0.5", ep_size=["2,4"], policy=["none,nonet"], dispatch=["even,waterfill"], steps=4, plan_steps=4,
        num_layers=2, num_experts=16, shape="json",
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["simulations"]
    assert [(r["ranks"], r["slots"], r["policy"], r["dispatch"]) for r in rows] == [
        (n, s, p, d) for n, s in [(2, 18), (4, 20)] for p in ("none", "nonet") for d in ("even", "waterfill")
    ]
    assert all(0 <= r["imbalance_mean"] < 1 and r["steps"] == 4 for r in rows)


def test_command_table_of_statistics_and_a_placement(tmp_path, capsys):
    """Statistics of a file, planned on the first half; and a placement of a YAML, replayed on all."""
    count = np.random.default_rng(0).integers(1, 50, (6, 3, 16))
    np.save(tmp_path / "count.npy", count)
    eplb_simulate.simulate(expert_statistic_path=tmp_path / "count.npy", ep_size=["4"])
    words = capsys.readouterr().out.split("\n")
    assert words[0].split()[:5] == ["ranks", "slots", "policy", "dispatch", "imbalance"]
    assert words[1].split()[:4] == ["4", "20", "nonet", "even"]
    assert words[2].startswith("3 steps each")
    rows = "".join(f"  {layer}: {[*range(16), *range(4)]}\n" for layer in range(3))
    (tmp_path / "plan.yaml").write_text(f"initial_global_assignments:\n{rows}num_slots: 20\n")
    path = tmp_path / "plan.yaml"
    eplb_simulate.simulate(expert_statistic_path=tmp_path / "count.npy", ep_size=["4"], placement=path)
    assert "6 steps each" in capsys.readouterr().out


def test_commands_are_registered(capsys):
    load = ["--load", "zipf:0.9", "--ep-size", "4", "--num_layers", "1", "--num-experts", "16", "--steps", "2"]
    for words in (["simulate", "--plan_steps", "2"], ["advise", "--imbalance", "0.3"]):
        with pytest.raises(SystemExit) as left:
            app(["eplb", *words, *load])
        assert left.value.code == 0
    text = capsys.readouterr().out
    assert "2 steps each" in text
    assert "imbalance 0.3 with dispatch even on 4 ranks" in text


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "--expert_statistic_path"),
        ({"load": "zipff"}, "load"),
        ({"load": "zipf:x"}, "load"),
        ({"load": "zipf", "ep_size": ["4x"]}, "--ep_size"),
        ({"load": "zipf", "ep_size": ["4"], "num_slots": ["255"]}, "--num_slots"),
        ({"load": "zipf", "ep_size": ["4"], "nodes": 3}, "--nodes"),
        ({"load": "zipf", "shape": "yaml"}, "--format"),
        ({"load": "zipf", "moves": "jump"}, "moves"),
        ({"load": "zipf", "sd": -1}, "sd"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, field):
    with pytest.raises(ConfigError) as caught:
        eplb_simulate.simulate(**{"steps": 1, "plan_steps": 1, "num_layers": 1} | arguments)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_picture_has_a_bar_for_each_simulation(tmp_path, capsys):
    import xml.etree.ElementTree as xml

    words = ["--load", "zipf", "--ep_size", "4", "--num_slots", "16,20", "--policy", "trtllm,nonet", "--steps", "3",
             "--plan_steps", "2", "--num_layers", "2", "--num_experts", "16"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        app(["eplb", "simulate", *words, "--plot", str(tmp_path / "bars.svg")])
    assert left.value.code == 0
    drawn = xml.parse(tmp_path / "bars.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in drawn.iter(f"{space}rect") if r.get("width") == "20"]
    said = [t.text for t in drawn.iter(f"{space}text")]
    assert len(bars) == 4
    assert len({r.get("x") for r in bars}) == 4
    assert all(float(r.get("height")) > 0 for r in bars)
    assert {"16 slots", "20 slots", "trtllm, even", "nonet, even"} <= set(said)
    with pytest.raises(SystemExit) as left:
        app(["eplb", "simulate", *words, "--plot", str(tmp_path / "bars.png")])
    assert left.value.code == 2
    assert "only SVG is drawn" in capsys.readouterr().err
