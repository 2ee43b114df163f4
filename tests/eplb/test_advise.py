"""Advice: the answer reaches the target, one slot less does not, and memory is what DeepSeek-V3 is known to need."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nonet.cli import eplb_simulate
from nonet.config.fleet import Fleet
from nonet.eplb.advise import advise
from nonet.eplb.memory import Memory, bytes_per_expert
from nonet.eplb.synthetic import popularity
from nonet.errors import ConfigError


def ask(load, ranks, target, **options):
    return advise(load, lambda slots: Fleet.even(ranks, slots), ranks, target, **options)


def test_by_hand():
    """Four ranks, one expert takes half of the load: with two replicas the hottest rank has 200 of 600, 1/3 above."""
    load = np.array([[300.0, 100, 100, 100]])
    found = ask(load, 4, 0.34)
    assert (found.least.slots, found.whole.slots, found.threshold) == (5, 8, 7)
    assert found.proven
    assert found.below is not None
    assert found.below.slots == 4
    assert found.below.bound > 0.34
    assert found.layer_slots_L.tolist() == [8]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("name", "ranks", "target"), [("lognormal:1.0", 16, 0.3), ("zipf:1.0", 24, 0.5), ("r1like", 8, 0.01)]
)
def test_the_answer_and_one_less(name, ranks, target, seed):
    load = popularity(name, 3, 64, seed)
    found = ask(load, ranks, target)
    assert found.least.imbalance <= target + 1e-9
    assert found.least.bound <= found.least.imbalance + 1e-9
    if found.below is not None:
        assert found.below.slots == found.least.slots - 1
        assert found.below.imbalance > target
    assert found.least.slots <= found.whole.slots
    assert found.whole.slots % ranks == 0
    assert found.proven == (found.below is None or found.below.bound > target)
    reached = found.whole.plan.imbalance_L <= target
    assert (found.layer_slots_L[reached] > 0).all()


def test_no_slot_to_spare():
    found = ask(np.ones((1, 8)), 4, 0.1)
    assert found.least.slots == 8
    assert found.below is None
    assert found.proven


@pytest.mark.parametrize(
    ("target", "most", "field"), [(0.01, 10, "imbalance"), (-1, None, "imbalance"), (0.1, 7, "most_slots")]
)
def test_out_of_reach_is_one_line(target, most, field):
    with pytest.raises(ConfigError) as caught:
        ask(np.array([[900.0, 1, 1, 1, 1, 1, 1, 1]]), 4, target, most_slots=most)
    assert caught.value.field == field


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_deepseek_v3():
    """58 layers of 256 experts of 44,040,192 bytes, one extra slot on each of 32 ranks: 2.38 GiB of redundancy."""
    memory = Memory.of(58, 256, 288, 32, 44_040_192)
    assert memory.redundancy == 58 * 44_040_192
    assert memory.redundancy / 2**30 == pytest.approx(2.38, abs=0.005)
    assert memory.experts == 9 * memory.redundancy
    assert memory.staging / 2**20 == pytest.approx(378, abs=0.5)
    assert memory.maps_and_window / 2**20 == pytest.approx(64, abs=1)
    assert len(memory.lines()) == 4


CONFIG = {
    "num_attention_heads": 128, "num_hidden_layers": 61, "hidden_size": 7168, "n_routed_experts": 256, "vocab_size": 8,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, 3 * 7168 * 2048 * 2),
        ({"torch_dtype": "float32"}, 3 * 7168 * 2048 * 4),
        ({"quantization_config": {"quant_method": "fp8"}}, 3 * 7168 * 2048 + 12),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            3 * (7168 * 2048 + 4 * 56 * 16),
        ),
    ],
)
def test_bytes_of_an_expert(tmp_path, change, wanted):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    assert bytes_per_expert(str(tmp_path)) == wanted


@pytest.mark.parametrize(
    "change", [{"n_routed_experts": 0}, {"torch_dtype": "int3"}, {"quantization_config": {"quant_method": "awq"}}]
)
def test_bytes_that_nobody_knows(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ConfigError, match="give --bytes_per_expert"):
        bytes_per_expert(str(tmp_path))


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_says_answer_proof_and_price(capsys):
    eplb_simulate.advise(
        0.2, load="lognormal", ep_size=["4"], num_layers=2, num_experts=16, steps=6, model="nonet-tiny", seed=3
    )
    text = capsys.readouterr().out
    assert text.startswith("imbalance 0.2 with dispatch even on 4 ranks takes ")
    for line in ("slots", "S ", "even", "from 19 slots on", "of it redundancy", "staging", "maps and statistics"):
        assert line in text


def test_command_json(capsys):
    eplb_simulate.advise(
        0.05, load="zipf:0.8", ep_size=["4,8"], num_layers=2, num_experts=16, steps=4, dispatch="waterfill",
        bytes_per_expert=1000, shape="json",
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in rows] == [4, 8]
    for row in rows:
        by_name = {line["what"]: line for line in row["plans"]}
        assert by_name["S"]["reaches"]
        assert by_name["S"]["planned"] <= 0.05
        assert set(row["layer_slots"]) == {"0", "1"}
        assert row["memory_bytes_a_rank"]["redundancy"] >= 0


def test_the_layer_of_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError) as caught:
        eplb_simulate.advise(0.1, load="zipf", ep_size=["4"], model="no-such-model", num_layers=1, steps=1)
    assert caught.value.field == "model"
