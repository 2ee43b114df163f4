"""Plans: laws that hold for any load and fleet, quality on loads of real size, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb.bounds import predicted
from nonet.eplb.placement import Placement
from nonet.eplb.plan import moves, plan
from nonet.eplb.synthetic import popularity
from nonet.errors import ConfigError

LOADS = ["uniform:0.2", "r1like", "lognormal:1.0", "zipf:0.8", "zipf:1.2", "hot4:0.4", "pareto:1.01"]


def ranks_joined(row, fleet) -> int:
    """Into how many parts the live ranks fall; two are joined by an expert that both hold."""
    part = {rank: rank for rank in fleet.live_ranks}
    for expert in set(row.tolist()):
        first, *others = {part[r] for r in part if expert in row[fleet.first_slot[r] : fleet.first_slot[r + 1]]}
        part = {rank: first if own in others else own for rank, own in part.items()}
    return len(set(part.values()))


# -- laws -----------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """(load [L, E] or [N, L, E], fleet): any load, any slots at or above what the experts need."""
    experts, ranks = draw(st.integers(1, 24)), draw(st.integers(1, 7))
    sizes = [draw(st.integers(0, 8)) for _ in range(ranks)]
    dead = frozenset(draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1)))
    live = [rank for rank in range(ranks) if rank not in dead]
    sizes[live[0]] += max(0, experts - sum(sizes[rank] for rank in live))
    speeds = tuple(draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in sizes) if draw(st.booleans()) else ()
    nodes = tuple(rank % 2 for rank in range(ranks)) if draw(st.booleans()) else ()
    value = st.sampled_from([0.0, 1.0, 1.0, 3.0, 10.0, 1e3, 1e12, 0.1])
    shape = draw(st.sampled_from([(1,), (2,), (3, 2)]))
    flat = draw(st.lists(value, min_size=experts * int(np.prod(shape)), max_size=experts * int(np.prod(shape))))
    return np.array(flat).reshape(*shape, experts), Fleet(tuple(sizes), nodes, speeds, dead)


def check(made, load, fleet) -> None:
    rows, experts = made.placement.expert_LG, load.shape[-1]
    assert rows.dtype == np.int32
    assert rows.shape == (load.shape[-2], fleet.num_slots)
    assert ((rows >= 0) & (rows < experts)).all()
    first = fleet.first_slot
    for row in rows:
        alive = set()
        for rank in fleet.live_ranks:
            own = row[first[rank] : first[rank + 1]].tolist()
            alive |= set(own)
            assert len(set(own)) == min(len(own), experts)  # no duplicate where it can be avoided
        assert len(alive) == experts
    assert (made.imbalance_L >= made.bound_L - 1e-9).all()
    assert (made.gap_L >= 0).all()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    problem=problems(),
    dispatch=st.sampled_from(["even", "waterfill"]),
    tolerance=st.sampled_from([None, 0.0, 0.1]),
    data=st.data(),
)
def test_every_plan_is_lawful(problem, dispatch, tolerance, data):
    load, fleet = problem
    groups = data.draw(st.sampled_from([None, *(n for n in range(1, 25) if load.shape[-1] % n == 0)]))
    asked = dict(dispatch=dispatch, tolerance=tolerance, num_groups=groups)
    made = plan(load, fleet, **asked)
    check(made, load, fleet)
    again = plan(load.copy(), fleet, **asked)
    assert (again.placement.expert_LG == made.placement.expert_LG).all()
    assert (made.moves_L == moves(made.placement)).all()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problem=problems(), data=st.data(), cap=st.integers(0, 12), dispatch=st.sampled_from(["even", "waterfill"]))
def test_a_cap_is_a_cap(problem, data, cap, dispatch):
    """From any placement, also one that was made when other ranks were alive: never more transfers than allowed."""
    load, fleet = problem
    experts, slots = load.shape[-1], fleet.num_slots
    row = st.lists(st.integers(0, experts - 1), min_size=slots, max_size=slots)
    rows = np.array(data.draw(st.lists(row, min_size=load.shape[-2], max_size=load.shape[-2])), dtype=np.int32)
    current = Placement(rows, fleet, experts)
    live = np.isin(current.rank_of_slot(), fleet.live_ranks)
    needed = max(experts - len(set(row[live].tolist())) for row in rows)
    if needed > cap:
        with pytest.raises(ConfigError, match="max_moves"):
            plan(load, fleet, current=current, max_moves=cap, dispatch=dispatch)
    else:
        made = plan(load, fleet, current=current, max_moves=cap, dispatch=dispatch)
        assert made.moves_L.max() <= cap
        assert all(set(row[live].tolist()) == set(range(experts)) for row in made.placement.expert_LG)
        assert (made.placement.expert_LG[:, ~live] == rows[:, ~live]).all()  # a dead rank's slots keep what they had
    check(plan(load, fleet, current=current, dispatch=dispatch), load, fleet)  # without a cap all laws hold


def test_what_lies_behind_repeated_experts_is_seen():
    """A rank with more slots than experts: expert 1 is there, behind two replicas of expert 0."""
    current = Placement(np.array([[0, 0, 1]], dtype=np.int32), Fleet((3,)), 2)
    made = plan([[1.0, 5.0]], Fleet((3,)), current=current, max_moves=0)
    assert made.moves_L.tolist() == [0]
    assert set(made.placement.expert_LG[0].tolist()) == {0, 1}


def test_an_expert_that_stays_keeps_its_slot():
    rng = np.random.default_rng(3)
    fleet = Fleet.even(8, 40)
    current = plan(rng.lognormal(0, 1, (3, 32)), fleet).placement
    for policy in ("nonet", "deepseek", "trtllm"):
        made = plan(rng.lognormal(0, 1, (3, 32)), fleet, policy=policy, current=current)
        for old, new in zip(current.expert_LG, made.placement.expert_LG, strict=True):
            for slots in np.split(np.arange(40), 8):
                kept = (old[slots] == new[slots]).sum()
                both = sum(min((old[slots] == e).sum(), (new[slots] == e).sum()) for e in set(old[slots].tolist()))
                assert kept == both


def test_a_good_placement_is_left_alone():
    load = popularity("r1like", 4, 64, 0)
    current = plan(load, Fleet.even(8, 72)).placement
    made = plan(load, Fleet.even(8, 72), current=current)
    assert made.moves_L.tolist() == [0] * 4
    assert (made.placement.expert_LG == current.expert_LG).all()


def test_one_sampled_step_is_its_own_mean():
    load = popularity("lognormal:1.0", 3, 32, 1)
    made = plan(load[None], Fleet.even(4, 36))
    assert (made.placement.expert_LG == plan(load, Fleet.even(4, 36)).placement.expert_LG).all()


# -- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("ranks", "slots"), [(32, 288), (32, 320), (36, 288)])
def test_near_the_bound_and_connected(ranks, slots, seed):
    """Eleven kinds of load come out like these; all of them are in the benchmark."""
    fleet = Fleet.even(ranks, slots)
    excess = {"nonet": 0.0, "deepseek": 0.0}
    for name in LOADS:
        load = popularity(name, 4, 256, seed)
        made = plan(load, fleet)
        assert made.gap_L.mean() <= 0.0005 * 1.5, name
        joined = [ranks_joined(row, fleet) for row in made.placement.expert_LG]
        assert np.mean(joined) <= max(1, ranks - (slots - 256)) + 0.5, name
        for policy in excess:
            excess[policy] += plan(load, fleet, policy=policy).gap_L.mean()
    assert excess["nonet"] <= 0.10 * excess["deepseek"]


@pytest.mark.parametrize(
    ("ranks", "slots", "most", "names"),
    [
        (72, 288, 0.0015 * 1.5, ["r1like", "uniform:0.2", "lognormal:1.0", "zipf:0.8", "dirichlet", "pareto:1.01"]),
        (144, 432, 0.005 * 1.5, ["r1like", "lognormal:1.0", "zipf:0.8", "pareto:1.01"]),
    ],
)
def test_few_slots_a_rank(ranks, slots, most, names):
    for name in names:
        made = plan(popularity(name, 4, 256, 0), Fleet.even(ranks, slots))
        assert made.gap_L.mean() <= most, name


def test_one_slot_a_rank_is_optimal():
    made = plan(popularity("zipf:1.0", 2, 256, 0), Fleet.even(320, 320))
    np.testing.assert_allclose(made.imbalance_L, made.bound_L, atol=1e-9)


def test_a_group_of_changes_at_once():
    """No single change of replicas leads from the greedy plan (232) to 200: several must come together."""
    load = np.array([[600, 560, 120, 120, 20, 10, 10, 10]], dtype=float)
    made = plan(load, Fleet.even(8, 16))
    assert (1 + made.imbalance_L[0]) * load.sum() / 8 <= 200 + 1e-9
    any_step = plan(load, Fleet.even(8, 16), dispatch="waterfill")
    assert any_step.imbalance_L[0] <= 1e-9  # connected: tokens can be split such that all ranks have the mean


def test_few_transfers_follow_a_drift():
    rng = np.random.default_rng(0)
    fleet, base = Fleet.even(32, 288), popularity("r1like", 6, 256, 0)
    noise = rng.standard_normal(base.shape)
    current = plan(base * np.exp(0.3 * noise), fleet).placement
    drifted = base * np.exp(0.3 * (0.95 * noise + np.sqrt(1 - 0.95**2) * rng.standard_normal(base.shape)))
    afresh = plan(drifted, fleet, policy="deepseek", current=current)
    made = plan(drifted, fleet, current=current)
    assert made.imbalance_L.mean() <= 0.02
    assert made.moves_L.mean() <= 0.07 * 1.5 * afresh.moves_L.mean()
    stepwise = plan(drifted, fleet, current=current, dispatch="waterfill")
    assert stepwise.moves_L.mean() <= 0.02 * 1.5 * afresh.moves_L.mean()
    assert max(ranks_joined(row, fleet) for row in stepwise.placement.expert_LG) == 1


def together(seed, steps=64, topics=8):
    """[N, 2, 256] loads of experts that are hot in the same steps: each belongs to a topic, and topics come and go."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, topics, (2, 256))
    weight = np.exp(0.5 * rng.standard_normal((steps, topics)))
    return popularity("r1like", 2, 256, seed) * weight[:, topic]


@pytest.mark.parametrize("dispatch", ["even", "waterfill"])
def test_experts_that_are_hot_together_are_kept_apart(dispatch):
    fleet, step_NLE = Fleet.even(32, 288), together(0)
    seen = step_NLE[:48]
    uneven = {}
    for name, load in (("mean", seen.mean(0)), ("steps", seen)):
        made = plan(load, fleet, dispatch=dispatch)
        uneven[name] = np.mean([predicted(load_LE, made.placement, "even") for load_LE in step_NLE[48:]])
        assert max(ranks_joined(row, fleet) for row in made.placement.expert_LG) == 1
    assert uneven["steps"] <= 0.6 * uneven["mean"]
    strict = plan(seen, fleet, dispatch=dispatch, tolerance=0.002)
    assert strict.imbalance_L.max() <= 0.002


def on_own_node(made, load, num_nodes) -> float:
    """The load that finds its expert on the node it comes from, if every node is the source of as much."""
    node_G = np.repeat(np.arange(num_nodes), made.placement.expert_LG.shape[1] // num_nodes)
    held_LEM = np.zeros((*load.shape, num_nodes), dtype=bool)
    held_LEM[np.arange(len(load))[:, None], made.placement.expert_LG, node_G] = True
    return float((load * held_LEM.sum(2)).sum() / load.sum() / num_nodes)


def test_replicas_go_to_several_nodes():
    load = popularity("r1like", 3, 256, 0)
    apart = Fleet((18,) * 16, node_of_rank=(0,) * 8 + (1,) * 8)
    made, flat = plan(load, apart), plan(load, Fleet.even(16, 288))
    assert on_own_node(made, load, 2) >= on_own_node(flat, load, 2) + 0.02
    assert made.gap_L.max() <= 0.001


def nodes_of_groups(made, load, groups, num_nodes) -> float:
    """Nodes over which a group's load lies, mean over groups: 1 / sum of squared parts."""
    out = []
    for row, load_E in zip(made.placement.expert_LG, load, strict=True):
        part_UM = np.zeros((groups, num_nodes))
        size_G = (load_E / np.bincount(row, minlength=len(load_E)))[row]
        np.add.at(part_UM, (row * groups // len(load_E), np.arange(len(row)) * num_nodes // len(row)), size_G)
        part_UM /= part_UM.sum(1, keepdims=True)
        out.append(1 / (part_UM**2).sum(1))
    return float(np.mean(out))


def test_groups_stay_near_their_node_without_the_price_of_a_hard_rule():
    load = popularity("r1like", 3, 256, 0)
    fleet = Fleet((9,) * 32, node_of_rank=tuple(rank // 8 for rank in range(32)))
    hard = plan(load, fleet, policy="deepseek", num_groups=8)
    soft, none = plan(load, fleet, num_groups=8), plan(load, fleet)
    assert nodes_of_groups(hard, load, 8, 4) == pytest.approx(1)
    assert nodes_of_groups(soft, load, 8, 4) <= 1.6
    assert nodes_of_groups(none, load, 8, 4) >= 3
    assert soft.imbalance_L.max() <= 0.011
    assert hard.imbalance_L.mean() >= 3 * soft.imbalance_L.mean()


def test_slow_ranks_and_dead_ranks_get_what_they_can():
    load = popularity("r1like", 3, 64, 0)
    speeds = (1.0,) * 6 + (0.5, 2.0)
    made = plan(load, Fleet((10,) * 8, speed_of_rank=speeds, dead_ranks=frozenset({2})))
    assert made.gap_L.max() <= 0.01


# -- refused --------------------------------------------------------------------------------------------------------

GOOD = [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("load", "arguments", "field", "remedy"),
    [
        ([1.0, 2.0], {}, "load", "[layers, experts]"),
        (np.zeros((1, 0)), {}, "load", "none of them 0"),
        ([[1.0, np.nan]], {}, "load", "finite"),
        ([[1.0, -1.0]], {}, "load", "0 or more"),
        ([[1e308, 1e308]], {}, "load", "too large"),
        ([[1.0] * 5], {}, "num_slots", "5 experts need at least 5 slots"),
        (GOOD, dict(policy="nonnet"), "policy", "did you mean 'nonet'?"),
        (GOOD, dict(dispatch="lp"), "dispatch", "known: even, waterfill"),
        (GOOD, dict(max_moves=2), "max_moves", "give `current`"),
        (GOOD, dict(tolerance=-0.1), "tolerance", "0 or more"),
        (GOOD, dict(tolerance=float("nan")), "tolerance", "0 or more"),
        (GOOD, dict(num_groups=2), "num_groups", "must divide 3"),
        (GOOD, dict(current=Placement.contiguous(2, 3, 2, 4)), "current", "must have the layers"),
        (GOOD, dict(current=Placement.contiguous(1, 3, 4, 4)), "current", "rank by rank"),
        (GOOD, dict(current=Placement.contiguous(1, 3, 2, 4), max_moves=-1), "max_moves", "0 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused(load, arguments, field, remedy):
    with pytest.raises(ConfigError) as caught:
        plan(load, Fleet.even(2, 4), **arguments)
    assert caught.value.field == field
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dead_ranks_have_no_slots():
    with pytest.raises(ConfigError, match="num_slots = 2: 3 experts need at least 3 slots on live ranks"):
        plan(GOOD, Fleet((2, 2), dead_ranks=frozenset({1})))


def test_default_means_nonet():
    assert plan(GOOD, Fleet.even(2, 4), policy="default").policy == "nonet"


def test_the_planner_needs_no_torch():
    script = "import sys, nonet.eplb.plan, nonet.eplb.policies.nonet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_threads_share_the_layers_and_change_nothing():
    load = np.random.default_rng(5).lognormal(0, 1, (7, 24))
    fleet = Fleet.even(4, 28)
    for asked in ({}, {"dispatch": "waterfill"}, {"current": Placement.contiguous(7, 24, 4, 28), "max_moves": 3}):
        alone, shared = (plan(load, fleet, threads=threads, **asked) for threads in (1, 3))
        assert np.array_equal(alone.placement.expert_LG, shared.placement.expert_LG)
        for name in ("imbalance_L", "bound_L", "moves_L"):
            assert np.array_equal(getattr(alone, name), getattr(shared, name))
    with pytest.raises(ConfigError, match="threads = 8: 1 to 7"):
        plan(load, fleet, threads=8)
    dead = Fleet((7, 7, 7, 7), dead_ranks=frozenset({3}))
    with pytest.raises(ConfigError, match="slots on live ranks"):
        plan(load, dead, threads=2)
