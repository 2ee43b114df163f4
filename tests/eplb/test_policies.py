"""The peers' policies give what the peers publish."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nonet import plugins
from nonet.config.fleet import Fleet
from nonet.eplb.plan import POLICIES, plan
from nonet.eplb.policies import trtllm
from nonet.errors import ConfigError

PUBLISHED = json.loads((Path(__file__).parent / "peers" / "published.json").read_text(encoding="utf-8"))
DEEPSEEK = PUBLISHED["deepseek"]


def test_policies_are_the_files_of_the_folder():
    assert plugins.names(POLICIES) == ("deepseek", "nonet", "trtllm")


def two_nodes() -> Fleet:
    ranks, nodes = DEEPSEEK["num_ranks"], DEEPSEEK["num_nodes"]
    slots = DEEPSEEK["num_slots"] // ranks
    return Fleet((slots,) * ranks, node_of_rank=tuple(rank * nodes // ranks for rank in range(ranks)))


def test_deepseek_as_published():
    made = plan(DEEPSEEK["load"], two_nodes(), policy="deepseek", num_groups=DEEPSEEK["num_groups"])
    assert made.placement.expert_LG.tolist() == DEEPSEEK["expert_of_slot"]


def test_deepseek_with_nodes_in_another_order():
    """Nodes are those the fleet names, wherever their ranks stand."""
    order = [4, 5, 6, 7, 0, 1, 2, 3]
    fleet = Fleet((2,) * 8, node_of_rank=tuple(two_nodes().nodes[rank] for rank in order))
    made = plan(DEEPSEEK["load"], fleet, policy="deepseek", num_groups=4)
    wanted = np.array(DEEPSEEK["expert_of_slot"]).reshape(2, 8, 2)[:, order].reshape(2, 16)
    assert made.placement.expert_LG.tolist() == wanted.tolist()


def test_deepseek_keeps_groups_on_a_node_and_global_does_not():
    load = np.random.default_rng(0).lognormal(0, 1, (3, 32))
    fleet = Fleet((5,) * 8, node_of_rank=(0,) * 4 + (1,) * 4)
    for row in plan(load, fleet, policy="deepseek", num_groups=8).placement.expert_LG:
        homes = [set(row[:20] // 4), set(row[20:] // 4)]
        assert not homes[0] & homes[1]
    spread = plan(load, fleet, policy="deepseek")
    assert any(set(row[:20] // 4) & set(row[20:] // 4) for row in spread.placement.expert_LG)
    uneven = plan(load, fleet, policy="deepseek", num_groups=1)  # one group does not divide over two nodes
    assert uneven.placement.expert_LG.tolist() == spread.placement.expert_LG.tolist()


@pytest.mark.parametrize("case", PUBLISHED["trtllm"]["replication"])
def test_trtllm_replicates_as_published(case):
    load = np.array(case["load"], dtype=float)
    assert trtllm.replicate(load, case["slots_a_rank"] * case["ranks"]).tolist() == case["replicas"]


@pytest.mark.parametrize("case", PUBLISHED["trtllm"]["placement"])
def test_trtllm_places_as_published(case):
    load, replicas = np.array(case["load"], dtype=float), np.array(case["replicas"])
    row = trtllm.pack(load, replicas, np.full(case["ranks"], case["slots_a_rank"]))
    assert np.bincount(row, minlength=len(load)).tolist() == case["replicas"]
    by_rank = (load / replicas)[row].reshape(case["ranks"], -1).sum(1)
    assert np.ptp(by_rank) <= case["difference"]


def test_trtllm_takes_ranks_of_unequal_size():
    made = plan([[4.0, 3.0, 2.0, 1.0]], Fleet((1, 4)), policy="trtllm")
    assert made.placement.expert_LG.tolist() == [[1, 0, 0, 2, 3]]


@pytest.mark.parametrize("policy", ["deepseek", "trtllm"])
def test_peers_refuse_what_they_do_not_know(policy):
    for fleet in (Fleet((2, 2), dead_ranks=frozenset({0})), Fleet((2, 2), speed_of_rank=(1.0, 2.0))):
        with pytest.raises(ConfigError, match="use nonet"):
            plan([[1.0, 1.0]], fleet, policy=policy)


def test_deepseek_refuses_what_does_not_divide():
    with pytest.raises(ConfigError, match="num_slots = 5: deepseek needs a multiple of 2 ranks"):
        plan([[1.0, 1.0]], Fleet.even(2, 5), policy="deepseek")
    with pytest.raises(ConfigError, match="node_of_rank"):
        plan([[1.0] * 4], Fleet((2,) * 3, node_of_rank=(0, 0, 1)), policy="deepseek", num_groups=2)


@pytest.mark.parametrize("policy", ["deepseek", "trtllm"])
def test_peers_cannot_keep_a_cap(policy):
    current = plan([[1.0, 2.0]], Fleet.even(2, 4), policy=policy).placement
    with pytest.raises(ConfigError, match="max_moves"):
        plan([[2.0, 1.0]], Fleet.even(2, 4), policy=policy, current=current, max_moves=1)
