"""A planned placement is served by its YAML in any form, ranks read their own experts; a bad one is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from oracle import MODELS, folder, prompts, reference

from nonet import LLM, ConfigError, SamplingParams
from nonet.cli.main import app
from nonet.config.dialects import read_arguments
from nonet.testing.equality import check_equality

NAME, LAYERS, EXPERTS = "step2", (1, 3), 8  # 8 experts in layers 1 and 3
ROW = [0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 1, 2]  # of 12 slots on 2 or 4 ranks
ASSIGNMENTS = {1: ROW, 3: [7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4]}
EP4 = ["-dp", "4", "-ep", "--dtype", "float32", "--max-num-batched-tokens", "64", "--max-num-seqs", "8"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


WIDE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=256, num_experts_per_tok=8,
    norm_topk_prob=True, tie_word_embeddings=False,
)  # fmt: skip


def balancer(path: Path, **changes: object) -> Path:
    """The YAML as it is planned, with changes; None leaves a key out."""
    tree = {"initial_global_assignments": ASSIGNMENTS, "num_slots": 12, "layer_updates_per_iter": 0, **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


def expert_bytes() -> int:
    """Of one expert's three matrices in float32."""
    model = MODELS[NAME]
    return 3 * int(model["hidden_size"]) * int(model["moe_intermediate_size"]) * 4


def engine(*words: str) -> LLM:
    return LLM(read_arguments([folder(NAME), *EP4, *words]).config)


def equal(llm: LLM) -> None:
    outs = llm.generate(prompts(int(MODELS[NAME]["vocab_size"]), [5, 30, 11, 2]), GREEDY)
    check_equality(reference(folder(NAME)), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])


def test_a_plan_is_served_and_ranks_read_only_their_experts(tmp_path):
    """Two slots a layer without a balancer, three with it: what each rank reads more is one expert a layer."""
    with engine("--num-slots", "0") as llm:
        assert llm.config.moe.load_balancer.num_slots == EXPERTS, "0 switches the balancer off"
        plain = [ready.bytes_read for ready in llm.client.ready]
        equal(llm)
    assert len(set(plain)) == 1
    with engine("--config", str(balancer(tmp_path / "plan.yaml"))) as llm:
        assert llm.config.moe.load_balancer.initial_global_assignments == ASSIGNMENTS
        assert [ready.bytes_read - plain[0] for ready in llm.client.ready] == [len(LAYERS) * expert_bytes()] * 4
        equal(llm)
        load = [stats.load for stats in llm.client.stats()]
    assert sum(sum(map(sum, rank)) for rank in load) > 0


@pytest.mark.parametrize("form", ["by itself", "by path", "inside", "without num_slots"])
def test_the_forms_in_which_a_plan_is_given(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    path = balancer(tmp_path / "plan.yaml", **({"num_slots": None} if form == "without num_slots" else {}))
    if form == "by path":
        (tmp_path / "wide.yaml").write_text("moe_config: {backend: WIDEEP, load_balancer: ./plan.yaml}\n")
    elif form == "inside":
        tree = {"moe_config": {"load_balancer": yaml.safe_load(path.read_text())}}
        (tmp_path / "wide.yaml").write_text(yaml.safe_dump(tree))
    words = ["--config", "wide.yaml" if form in ("by path", "inside") else "plan.yaml"]
    shown = printed(folder(NAME), *EP4, *words)
    assert (shown["num_slots"], shown["num_redundant_experts"]) == (12, 4)
    assert shown["initial_global_assignments"] == {str(layer): row for layer, row in ASSIGNMENTS.items()}


def printed(*words: str) -> dict:
    """The balancer's settings as --print-config has them."""
    from nonet.cli.serve import resolved_text

    balancer: dict = yaml.safe_load(resolved_text(read_arguments(words)))["moe"]["load_balancer"]
    return json.loads(json.dumps(balancer))


BAD = {
    "a missing layer": ({"initial_global_assignments": {1: ROW}},
                        "initial_global_assignments = [1]: layer 3 is missing; give every MoE layer"),
    "a dense layer": ({"initial_global_assignments": {**ASSIGNMENTS, 2: ROW}},
                      "initial_global_assignments = 2: layer 2 holds no experts; these do: [1, 3]"),
    "an unknown expert": ({"initial_global_assignments": {**ASSIGNMENTS, 3: [*ROW[:-1], 8]}},
                          "initial_global_assignments = 8: layer 3: experts are 0 to 7"),
    "a wrong length": ({"initial_global_assignments": {**ASSIGNMENTS, 3: ROW[:-1]}},
                       "initial_global_assignments = 11: layer 3 must name an expert for each of 12 slots"),
    "an expert lost": ({"initial_global_assignments": {**ASSIGNMENTS, 3: [0] * 12}},
                       "initial_global_assignments = 1: layer 3: this expert has no slot; every expert needs one"),
    "lists of text": ({"initial_global_assignments": {1: "0, 1"}},
                      "plan.yaml: initial_global_assignments = '0, 1': input should be a valid list"),
    "layers of text": ({"initial_global_assignments": {"first": ROW}},
                       "plan.yaml: initial_global_assignments = 'first': input should be a valid integer"),
    "other slots": ({"num_slots": 16}, "initial_global_assignments = 12: layer 1 must name an expert for each of 16"),
    "too few slots": ({"num_slots": 4, "initial_global_assignments": None},
                      "num_slots = 4: the model has 8 experts, and each needs a slot"),
    "slots that do not divide": ({"num_slots": 10, "initial_global_assignments": None},
                                 "num_slots = 10: does not divide over 4 ranks; nearest: 8"),
    "switched off and given": ({"num_slots": 0}, "num_slots = 0: switches the balancer off; leave initial_global_"),
    "negative slots": ({"num_slots": -4}, "plan.yaml: num_slots = -4: input should be greater than or equal to 0"),
    "an unknown key": ({"num_slot": 12}, "plan.yaml: num_slot = 12: unknown key; did you mean 'num_slots'?"),
    "moves while serving": ({"layer_updates_per_iter": 2},
                            "layer_updates_per_iter = 2: online balancing is not built yet"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("form", ["by itself", "by path"])
def test_a_bad_plan_is_one_line(tmp_path, monkeypatch, capsys, changes, line, form):
    monkeypatch.chdir(tmp_path)
    balancer(tmp_path / "plan.yaml", **changes)
    (tmp_path / "wide.yaml").write_text("moe_config: {load_balancer: plan.yaml}\n")
    words = ["--config", "wide.yaml" if form == "by path" else "plan.yaml"]
    with pytest.raises(SystemExit) as left:
        app(["serve", folder(NAME), *EP4, *words, "--print-config"])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_a_bad_plan_is_refused_before_any_rank_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("nonet.engine.client.Node", None)
    with pytest.raises(ConfigError, match=r"layer 3 is missing; give every MoE layer"):
        engine("--config", str(balancer(tmp_path / "plan.yaml", initial_global_assignments={1: ROW})))


def test_a_file_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, line in {
        "none.yaml": "cannot be read: No such file or directory",
        "list.yaml": "must hold a mapping of settings",
        "bad.yaml": "is not YAML: ",
    }.items():
        (tmp_path / "wide.yaml").write_text(f"moe_config: {{load_balancer: {name}}}\n")
        with pytest.raises(SystemExit) as left:
            app(["serve", folder(NAME), *EP4, "--config", "wide.yaml", "--print-config"])
        out, err = capsys.readouterr()
        assert (left.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: wide.yaml: moe_config.load_balancer = '{name}': {line}")


def test_redundant_experts_that_do_not_divide_start(caplog):
    """vLLM's own example: 256 experts, EP 8, two redundant."""
    MODELS.setdefault("wide256", WIDE)
    words = ["--data-parallel-size", "8", "--enable-expert-parallel", "--eplb-config", '{"num_redundant_experts":2}']
    with LLM(read_arguments([folder("wide256"), "--dtype", "float32", "--num-blocks", "16", *words]).config) as llm:
        balancer = llm.config.moe.load_balancer
        assert (balancer.num_redundant_experts, balancer.num_slots) == (8, 264)
        outs = llm.generate(prompts(64, [5, 30, 11, 2, 9, 9, 9, 9]), GREEDY)
    check_equality(reference(folder("wide256")), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])
    told = "num_redundant_experts = 2: 258 slots do not divide over 8 ranks: 8 are used, 33 slots a rank"
    assert told in caplog.messages
