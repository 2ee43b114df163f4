"""Every command line and YAML of the documents through `nonet serve --print-config`, compared with a table."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml
from spec_cases import CASES, LARGE, Case, arguments, shell_words

from nonet.cli.main import app
from nonet.config import build_config, load_config
from nonet.config.env import HARMLESS, MISSING, VARIABLES
from nonet.config.load import leaves

# Settled for every configuration, whatever is asked; tests of resolving have their values.
ALWAYS = {"model.model", "model.tokenizer", "model.dtype", "model.max_model_len", "model.attention_backend",
          "parallel.device", "cache.num_blocks", "moe.expert_backend", "runtime.threads_per_rank"}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    return str(folder)


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """printed(arguments, files, variables): (exit code, standard output, standard error) in a folder of its own."""
    for variable in (*VARIABLES, *HARMLESS, *MISSING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(words: list[str], files: dict[str, str] | None = None, variables: dict[str, str] | None = None):
        for name, text in (files or {}).items():
            (tmp_path / name).write_text(text)
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            app([*words, "--print-config"])
        return left.value.code, *capsys.readouterr()

    return call


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        found |= {dotted: value} if dotted in leaves().values() else flat(value, f"{dotted}.")
    return found


def asked_for(text: str) -> dict[str, object]:
    """The printed settings but for those that nobody asked for: they have their default."""
    default = flat(build_config("m").model_dump())
    default["moe.load_balancer.num_redundant_experts"] = 0
    tree = flat(yaml.safe_load(text))
    return {name: value for name, value in tree.items() if name not in ALWAYS and value != default[name]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source}: {case.name}")
def test_a_command_of_a_document(case: Case, printed, large):
    code, out, err = printed(arguments(case.command, large), case.files, case.variables)
    if case.refused:
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {case.refused}")
        assert err.count("\n") == 1
        return
    assert (code, err) == (0, "")
    wanted = {**case.settings}
    for name, value in wanted.items():
        if isinstance(value, str):
            wanted[name] = value.replace("{cwd}", os.getcwd())
    balancer = "moe.load_balancer."
    wanted.setdefault(f"{balancer}num_slots", 256)
    wanted.setdefault("server.served_model_name", [large])
    wanted[f"{balancer}num_redundant_experts"] = wanted[f"{balancer}num_slots"] - 256
    default = flat(build_config("m").model_dump())
    default[f"{balancer}num_redundant_experts"] = 0
    assert asked_for(out) == {name: value for name, value in wanted.items() if value != default[name]}
    assert re.findall("^# note: (.*)$", out, re.MULTILINE) == list(case.notes)
    assert yaml.safe_load(out)["model"]["model"] == large
    assert load_config_of(out) == yaml.safe_load(out)


def load_config_of(text: str) -> dict:
    """What is printed is a configuration: it is read back as it stands."""
    tree = yaml.safe_load(text)
    return json.loads(json.dumps(build_config(**tree).model_dump()))


def test_every_document_is_there():
    assert len({case.source for case in CASES}) == 5
    assert len(CASES) >= 35
    assert sum(bool(case.refused) for case in CASES) >= 12


def test_comments_behind_backslashes_are_read_as_they_are_meant():
    assert shell_words("a b \\  # two\n  --c=8 # end\n") == ["a", "b", "--c=8"]


# -- where values come from -------------------------------------------------------------------------------------------


def comments(text: str) -> dict[str, str]:
    """Leaf name -> the comment behind its value."""
    return {m[1]: m[2] for m in re.finditer(r"^\s*(\w+): .*?  # (.*)$", text, re.MULTILINE)}


def test_every_line_says_where_its_value_comes_from(printed):
    files = {"wide.yaml": "enable_attention_dp: true\nmoe_config: {max_num_tokens: 64}\nmax_batch_size: 9\nport: 1\n"}
    variables = {"VLLM_MOE_DP_CHUNK_SIZE": "8"}
    words = ["nonet-tiny", "--tp", "4", "--ep=4", "--config", "wide.yaml", "--port", "2", "--api-key", "x", "y"]
    code, out, err = printed(["serve", *words], files, variables)
    assert (code, err) == (0, "")
    said = comments(out)
    assert set(said) == set(leaves()), "every setting has a comment"
    assert said["data_parallel_size"] == "--tp with wide.yaml: enable_attention_dp"
    assert said["enable_expert_parallel"] == "--ep"
    assert said["max_num_tokens"] == "wide.yaml: moe_config.max_num_tokens (64), resolved"
    assert said["dp_chunk_size"] == "VLLM_MOE_DP_CHUNK_SIZE"
    assert said["max_num_seqs"] == "wide.yaml: max_batch_size"
    assert said["port"] == "--port"
    assert said["dtype"] == 'default ("auto"), resolved'
    assert said["block_size"] == "default"
    tree = yaml.safe_load(out)
    assert (tree["moe"]["max_num_tokens"], tree["server"]["port"]) == (32, 2), "the smaller chunk; the flag"
    assert (tree["server"]["api_key"], said["api_key"]) == (["***", "***"], "--api-key, hidden")


def test_what_is_printed_can_be_served(printed, tmp_path):
    """As --config, it comes to the same tree."""
    words = ["serve", "nonet-tiny", "-dp", "4", "-ep", "--all2all-backend", "pplx", "--num-redundant-experts", "3"]
    _, first, _ = printed(words)
    (tmp_path / "printed.yaml").write_text(first)
    code, second, err = printed(["serve", "--config", "printed.yaml"])
    assert (code, err) == (0, "")
    assert yaml.safe_load(second) == yaml.safe_load(first)
    assert "# note" not in second, "nothing is left to be replaced"
    assert load_config(tmp_path / "printed.yaml").moe.load_balancer.num_slots == 36


def test_gpus_are_not_needed(printed):
    words = ["nonet-tiny", "-dp", "8", "-ep", "--device", "cuda", "--all2all-backend", "pplx"]
    code, out, err = printed(["serve", *words])
    assert (code, err) == (0, "")
    tree = yaml.safe_load(out)
    assert (tree["parallel"]["device"], tree["moe"]["all2all_backend"]) == ("cuda", "nvlink_low_latency")
    line = "stands for exchange within a node, on cuda: 'nvlink_low_latency' is used"
    assert f"# note: all2all_backend = 'pplx': {line}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-dp", "2", "-ep", "--all2all-backend", "pplx"],
         "all2all_backend = 'pplx': stands for exchange within a node, on cpu: 'shm' is used; strict refuses this"),
        (["--all2all-backend", "shm"],
         "all2all_backend = 'shm': one rank sends to nobody: 'local' is used; strict refuses this"),
        (["-dp", "2", "-ep", "--num-redundant-experts", "1"],
         "num_redundant_experts = 1: 33 slots do not divide over 2 ranks: 2 are used, 17 slots a rank; "
         "strict refuses this"),
        (["--moe-config.backend", "cutlass"],
         "--moe-config.backend = 'cutlass': names a kernel library that nonet does not use; expert_backend decides; "
         "leave it out, or start without --strict"),
    ],
)  # fmt: skip
def test_strict_refuses_what_would_be_replaced(printed, words, message):
    assert printed(["serve", "nonet-tiny", *words])[0] == 0
    assert printed(["serve", "nonet-tiny", *words, "--strict"]) == (2, "", f"error: {message}\n")
