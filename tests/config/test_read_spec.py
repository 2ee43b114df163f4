"""Reading config.json: old and new keys, what is derived, what is broken, and what is refused instead of ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import SMALL, write_model

from nonet.config.checkpoint import find_folder, read_spec, refuse_unsupported
from nonet.errors import ConfigError, ModelError


def test_a_config_as_it_stands(tmp_path):
    spec = read_spec(write_model(tmp_path))
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.num_heads) == (100, 48, 4, 12)
    assert (spec.num_kv_heads, spec.head_dim, spec.num_experts, spec.top_k) == (4, 8, 22, 5)
    assert (spec.moe_intermediate_size, spec.max_position, spec.moe_layers) == (24, 512, (0, 1, 2, 3))
    assert (spec.rope_theta, spec.rms_norm_eps, spec.dtype, spec.eos_token_ids) == (5000.0, 1e-5, "bfloat16", (7,))
    assert (spec.architecture, spec.tie_word_embeddings) == ("Qwen3MoeForCausalLM", False)
    assert spec.raw == SMALL


NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "dtype": "bfloat16"}


def test_old_and_new_keys_give_the_same(tmp_path):
    old = read_spec(write_model(tmp_path))
    new = read_spec(write_model(tmp_path, without=("rope_theta", "torch_dtype"), **NEW))
    assert (new.rope_theta, new.dtype) == (old.rope_theta, old.dtype)


def test_new_keys_win_where_both_stand(tmp_path):
    spec = read_spec(write_model(tmp_path, rope_parameters={"rope_theta": 9.0}, dtype="float32"))
    assert (spec.rope_theta, spec.dtype) == (9.0, "float32")


def test_what_transformers_writes_is_read(tmp_path):
    from transformers import Qwen3MoeConfig

    given = {key: value for key, value in SMALL.items() if key not in ("architectures", "torch_dtype")}
    theirs = Qwen3MoeConfig(**given, dtype="float16", mlp_only_layers=[2], tie_word_embeddings=True)
    theirs.architectures = ["Qwen3MoeForCausalLM"]
    theirs.save_pretrained(tmp_path)
    spec = read_spec(str(tmp_path))
    refuse_unsupported(spec)
    assert (spec.num_experts, spec.top_k, spec.head_dim, spec.moe_layers) == (22, 5, 8, (0, 1, 3))
    assert (spec.rope_theta, spec.dtype, spec.tie_word_embeddings) == (5000.0, "float16", True)
    assert spec.eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "without", "name", "value"),
    [
        ({}, ("num_key_value_heads",), "num_kv_heads", 12),
        ({}, ("head_dim",), "head_dim", 4),
        ({"head_dim": None}, (), "head_dim", 4),
        ({}, ("rope_theta",), "rope_theta", 10000.0),
        ({}, ("torch_dtype",), "dtype", "bfloat16"),
        ({"torch_dtype": "torch.float16"}, (), "dtype", "float16"),
        ({}, ("eos_token_id",), "eos_token_ids", ()),
        ({"eos_token_id": None}, (), "eos_token_ids", ()),
        ({"eos_token_id": 0}, (), "eos_token_ids", (0,)),
        ({"eos_token_id": [3, 4]}, (), "eos_token_ids", (3, 4)),
        ({"num_local_experts": 6}, ("num_experts",), "num_experts", 6),
        ({"n_routed_experts": 6}, ("num_experts",), "num_experts", 6),
        ({"decoder_sparse_step": 2}, (), "moe_layers", (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (), "moe_layers", (1, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (), "moe_layers", (3,)),
        ({"mlp_only_layers": None}, (), "moe_layers", (0, 1, 2, 3)),
    ],
)
def test_what_is_left_out_or_said_otherwise(tmp_path, changes, without, name, value):
    assert getattr(read_spec(write_model(tmp_path, without, **changes)), name) == value


def test_the_generation_config_knows_the_end_tokens_better(tmp_path):
    folder = Path(write_model(tmp_path))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_spec(str(folder)).eos_token_ids == (1, 2)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    assert read_spec(str(folder)).eos_token_ids == (7,)


# -- where it stands --------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_found_by_name():
    spec = read_spec("nonet-tiny")
    refuse_unsupported(spec)
    assert (spec.num_experts, spec.top_k, len(spec.moe_layers)) == (32, 4, 5)
    assert find_folder("nonet-tiny").name == "nonet-tiny"


def test_an_unknown_name_lists_what_is_shipped():
    with pytest.raises(ConfigError, match=r"^model = 'nonet-huge': no such folder; .* one of: .*nonet-tiny"):
        read_spec("nonet-huge")


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"the folder has no config\.json"):
        read_spec(str(tmp_path))


def test_a_folder_in_the_home_directory(tmp_path, monkeypatch):
    write_model(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_spec("~/model0").num_experts == 22


# -- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_key_is_named(tmp_path, key):
    folder = write_model(tmp_path, without=(key,))
    with pytest.raises(ModelError, match=rf"config\.json: key '{key}' is missing$"):
        read_spec(folder)


@pytest.mark.parametrize("value", [0, -1, "many", None, 1.5])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_is_none_is_named(tmp_path, key, value):
    folder = write_model(tmp_path, **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json: {key} = .* must be a positive count$"):
        read_spec(folder)


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": "many"}, {"rope_parameters": "default"}, {"eos_token_id": {}}, {"mlp_only_layers": 3}],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_a_model_error(tmp_path, changes):
    folder = write_model(tmp_path, **changes)
    with pytest.raises(ModelError, match=r"config\.json: "):
        read_spec(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("", "is not JSON"), ("[1]", "must hold a mapping")]
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_that_is_broken(tmp_path, file, text, message):
    folder = write_model(tmp_path)
    (Path(folder) / file).write_text(text)
    with pytest.raises(ModelError, match=rf"/{file} {message}"):
        read_spec(folder)


def test_bytes_that_are_no_text(tmp_path):
    folder = write_model(tmp_path)
    (Path(folder) / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        read_spec(folder)


# -- what is refused --------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        NEW,
        {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}},
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"hidden_act": "silu", "attention_bias": True, "quantization_config": None},
        {"num_experts_per_tok": 22},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_what_is_supported(tmp_path, changes):
    refuse_unsupported(read_spec(write_model(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("rope_scaling", "yarn", "one mapping for all layers"),
        ("use_sliding_window", True, "false"),
        ("hidden_act", "gelu", "silu"),
        ("num_experts", 0, "Mixture-of-Experts models"),
        ("num_experts_per_tok", 23, "1 to 22"),
        ("num_experts_per_tok", 0, "1 to 22"),
        ("mlp_only_layers", [0, 1, 2, 3], "at least one layer with experts"),
        ("head_dim", 7, "even widths"),
        ("num_key_value_heads", 5, "divisors of the 12 heads"),
    ],
)
def test_what_is_refused_names_key_value_and_what_is_supported(tmp_path, key, value, supported):
    spec = read_spec(write_model(tmp_path, **{key: value}))
    with pytest.raises(ModelError) as caught:
        refuse_unsupported(spec)
    message = str(caught.value)
    assert f"config.json: {key} = {value!r} is not supported; supported: {supported}" in message
    assert "\n" not in message


def test_a_dense_model_is_refused(tmp_path):
    without = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    with pytest.raises(ModelError, match="num_experts = 0 is not supported; supported: Mixture-of-Experts models"):
        refuse_unsupported(read_spec(write_model(tmp_path, without)))
