"""`nonet models`: the families as their files describe them, and what it says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nonet.cli.main import app
from nonet.models.base import families


@pytest.fixture
def cli(capsys):
    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(arguments))
        return left.value.code, *capsys.readouterr()

    return call


def test_every_family_with_its_architectures_and_its_own_words(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    code, out, err = cli("models")
    assert (code, err) == (0, "")
    assert all(len(line) <= 70 for line in out.splitlines() if line.startswith(" "))
    flat = " ".join(out.split())
    files = {path.stem for path in (Path(__file__).parents[2] / "nonet" / "models").glob("*.py")}
    assert set(families()) == files - {"__init__", "base", "decoder"}
    for name, module in families().items():
        assert f"{name}: {', '.join(module.ARCHITECTURES)}" in out
        assert " ".join(module.__doc__.split()) in flat


def test_who_serves_a_shipped_model(cli):
    said = "nonet-tiny: qwen3_moe (Qwen3MoeForCausalLM), experts in 5 of 5 layers, 32 in each, 4 a token\n"
    assert cli("models", "nonet-tiny") == (0, said, "")


SHAPE = dict(vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=1, intermediate_size=22)  # fmt: skip


def write(folder: Path, architecture: str, **more: object) -> str:
    (folder / "config.json").write_text(json.dumps({**SHAPE, "architectures": [architecture], **more}))
    return str(folder)


def test_an_unknown_architecture_is_refused_with_those_that_exist(cli, tmp_path):
    code, out, err = cli("models", write(tmp_path, "Grok1ForCausalLM"))
    assert (code, out) == (3, "")
    assert err.startswith("error: architecture Grok1ForCausalLM is not supported; supported: DeepseekV2ForCausalLM, ")
    assert err.count("\n") == 1
    assert all(name in err for module in families().values() for name in module.ARCHITECTURES)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MIXTRAL, LLAMA, GPT = "MixtralForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM"
OURS = {"rope_parameters": YARN, "sliding_window": 128}


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (MIXTRAL, {"sliding_window": 0}, "sliding_window = 0 is not supported; supported: a positive count, or null"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; supported: silu"),
        (LLAMA, {"num_experts_per_tok": 2},
         "num_experts_per_tok = 2 is not supported; supported: 1: a score scales what its expert gets"),
        (LLAMA, {}, "attention_chunk_size = None is not supported; supported: a positive count"),
        (LLAMA, {"no_rope_layers": [1, 0]},
         "no_rope_layers = [1, 0] is not supported; supported: a number for each of 3 layers"),
        (LLAMA, {"layer_types": ["full_attention"]},
         "layer_types = ['full_attention'] is not supported; supported: a word for each of 3 layers"),
        (LLAMA, {"layer_types": ["full_attention", "odd", "full_attention"]},
         "layer_types = ['full_attention', 'odd', 'full_attention'] is not supported; "
         "supported: chunked_attention, full_attention"),
        (LLAMA, {"attention_chunk_size": 8, "quantization_config": {"quant_method": "fp8"}},
         "quantization_config = {'quant_method': 'fp8'} is not supported; "
         "supported: none: fused experts are read as plain numbers"),
        (LLAMA, {"attention_chunk_size": 8, "rope_parameters": YARN},
         "rope_type = 'yarn' is not supported; "
         "supported: default, linear, llama3: those that keep the lengths of q and k"),
        (GPT, {**OURS, "quantization_config": {"quant_method": "mxfp4"}},
         "quantization_config.quant_method = 'mxfp4' is not supported; "
         "supported: none; save it in bfloat16 first, as docs/models.md says"),
        (GPT, {**OURS, "swiglu_limit": 9.0}, "swiglu_limit = 9.0 is not supported; supported: 7.0"),
        (GPT, {**OURS, "sliding_window": None}, "sliding_window = None is not supported; supported: a positive count"),
        (GPT, {"sliding_window": 128},
         "rope_parameters = None is not supported; supported: the family's, given in full"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_do_is_refused(cli, tmp_path, architecture, changes, message):
    folder = write(tmp_path, architecture, **changes)
    assert cli("models", folder) == (3, "", f"error: {folder}/config.json: {message}\n")


@pytest.mark.parametrize(
    ("architecture", "changes", "name"),
    [
        (MIXTRAL, {}, "mixtral"),
        (MIXTRAL, {"sliding_window": 4096}, "mixtral"),
        (LLAMA, {"attention_chunk_size": 8192}, "llama4"),
        (LLAMA, {"no_rope_layers": [0, 0, 0]}, "llama4"),
        (GPT, OURS, "gpt_oss"),
        (GPT, {**OURS, "sliding_window": None, "layer_types": ["full_attention"] * 3}, "gpt_oss"),
    ],
)
def test_what_a_family_does(cli, tmp_path, architecture, changes, name):
    folder = write(tmp_path, architecture, **changes)
    said = f"{folder}: {name} ({architecture}), experts in 3 of 3 layers, 4 in each, 1 a token\n"
    assert cli("models", folder) == (0, said, "")


def test_the_language_model_of_one_that_sees(cli, tmp_path):
    text = {**SHAPE, "attention_chunk_size": 64}
    config = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = cli("models", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}: llama4 (Llama4ForConditionalGeneration), experts in 3 of 3 layers")
