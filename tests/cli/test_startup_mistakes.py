"""A mistake at start-up is one line on standard error with field, value and remedy, and its exit code. Nothing starts.

Through the real command; what a checkpoint's files hold is found by a rank, so those cases start one.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nonet.cli.main import app
from nonet.config.checkpoint import SHIPPED
from nonet.config.env import HARMLESS, MISSING, VARIABLES

TINY = SHIPPED / "nonet-tiny"


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    for variable in (*VARIABLES, *HARMLESS, *MISSING):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(capfd):
    """start(*arguments): (exit code, standard output, standard error), those of processes it started included."""

    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(arguments))
        return left.value.code, *capfd.readouterr()

    return call


def write_tiny(folder: Path, **changes: object) -> str:
    """nonet-tiny with another config.json, and no weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.symlink(TINY / name, folder / name)
    config = {**json.loads((TINY / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# What follows `nonet serve`, files by name, and the line.
MISTAKES: list[tuple[str, dict[str, str], str]] = [
    ("nonet-tiny --tensor-paralel-size 2", {},
     "--tensor-paralel-size = '2': unknown flag; did you mean --tensor-parallel-size?"),
    ("nonet-tiny --all2all-backnd=shm", {}, "--all2all-backnd = 'shm': unknown flag; did you mean --all2all-backend?"),
    ("nonet-tiny --xyzzy", {}, "--xyzzy = None: unknown flag; --help lists all"),
    ("nonet-tiny -x", {}, "-x = None: unknown flag; --help lists all"),
    ("nonet-tiny --config a.yaml", {"a.yaml": "enable_attention_pd: true"},
     "a.yaml: enable_attention_pd = True: unknown key; did you mean 'enable_attention_dp'?"),
    ("nonet-tiny --config a.yaml", {"a.yaml": "moe_config: {max_tokens: 8}"},
     "a.yaml: moe_config.max_tokens = 8: unknown key; did you mean 'max_num_tokens'?"),
    ("nonet-tiny --config none.yaml", {}, "--config = 'none.yaml': cannot be read: No such file or directory"),
    ("nonet-tiny --config .", {}, "--config = '.': cannot be read: Is a directory"),
    ("nonet-tiny --extra_llm_api_options a.yaml", {"a.yaml": "- 1"},
     "--extra_llm_api_options = 'a.yaml': must hold a mapping of settings"),
    ("nonet-tiny --config a.yaml", {"a.yaml": "moe_config: ["},
     "--config = 'a.yaml': is not YAML: while parsing a flow"),
    ("nonet-tiny --config a.yaml", {"a.yaml": "moe_config: {load_balancer: b.yaml}"},
     "a.yaml: moe_config.load_balancer = 'b.yaml': cannot be read: No such file or directory"),
    ("nonet-tiny --eplb-config {window", {}, "--eplb-config = '{window': is not JSON (Expecting property name"),
    ("nonet-tiny --eplb-config 5", {}, "--eplb-config = 5: use a JSON mapping"),
    ("nonet-tiny --eplb-config.windw_size 5", {}, "--eplb-config.windw_size = '5': unknown flag; "
     "did you mean --eplb-config.window_size?"),
    ("nonet-tiny --max-num-seqs -1", {}, "--max-num-seqs = -1: input should be greater than or equal to 1"),
    ("nonet-tiny --block-size 0", {}, "--block-size = 0: input should be greater than or equal to 1"),
    ("nonet-tiny --block-size many", {}, "--block-size = 'many': input should be a valid integer"),
    ("nonet-tiny --port 99999", {}, "--port = 99999: input should be less than or equal to 65535"),
    ("nonet-tiny --gpu-memory-utilization 1.5", {},
     "--gpu-memory-utilization = 1.5: input should be less than or equal"),
    ("nonet-tiny --dtype float64", {},
     "--dtype = 'float64': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
    ("nonet-tiny --port", {}, "--port = None: needs a value"),
    ("nonet-tiny --served-model-name --port 1", {}, "--served-model-name = None: needs at least one value"),
    ("nonet-tiny --enable-expert-parallel=perhaps", {}, "--enable-expert-parallel = 'perhaps': use true or false"),
    ("nonet-tiny -tp 2 --tp 4", {}, "--tp = 4: says the same as -tp, which is 2; give one of the two"),
    ("nonet-tiny --config a.yaml", {"a.yaml": "tp: 2\ntensor-parallel-size: 4"},
     "a.yaml: tensor_parallel_size = 4: says the same as a.yaml: tp, which is 2; give one of the two"),
    ("nonet-tiny --tp 4 --ep 3", {}, "--ep = 3: experts are spread over all 4 ranks or over none; use 4 or 1"),
    ("nonet-tiny --headless", {}, "--headless = True: not built yet: serving over several hosts; leave it out"),
    ("", {}, "MODEL = None: give the folder of a checkpoint, or nonet-tiny, which is shipped"),
    ("nowhere", {}, "model = 'nowhere': no such folder; give a checkpoint's folder or one of: nonet-tiny"),
    (".", {}, "model = '.': the folder has no config.json; give a checkpoint in Hugging Face form"),
    ("a" * 300, {}, f"model = '{'a' * 300}': cannot be read: File name too long"),
    ("nonet-tiny -tp 3", {},
     "tensor_parallel_size = 3: does not divide the model's 8 heads; nearest that works: 2 or 4"),
    ("nonet-tiny -dp 33 -ep", {}, "num_slots = 32: each rank needs a slot; use 33, or fewer ranks"),
    ("nonet-tiny -dp 2 -ep --num-slots 33", {}, "num_slots = 33: does not divide over 2 ranks; nearest: 32"),
    ("nonet-tiny --num-slots 8", {}, "num_slots = 8: the model has 32 experts, and each needs a slot"),
    ("nonet-tiny --num-slots 34 --num-redundant-experts 8 -ep", {},
     "num_redundant_experts = 8: num_slots = 34 leaves 2 beyond the 32 experts; give one of the two"),
    ("nonet-tiny --num-redundant-experts 8 -dp 2", {},
     "num_redundant_experts = 8: replicas need enable_expert_parallel"),
    ("nonet-tiny -ep --config a.yaml", {"a.yaml": "initial_global_assignments: {0: [0, 1]}"},
     "initial_global_assignments = 2: layer 0 must name an expert for each of 32 slots"),
    ("nonet-tiny -ep --initial-global-assignments {\"7\":[]}", {},
     "initial_global_assignments = 7: layer 7 holds no experts; these do: [0, 1, 2, 3, 4]"),
    ("nonet-tiny --all2all-backend shn", {}, "all2all_backend = 'shn': did you mean 'shm'?"),
    ("nonet-tiny --all2all-backend deepep_low_latenc", {},
     "all2all_backend = 'deepep_low_latenc': did you mean 'deepep_low_latency'?"),
    ("nonet-tiny --max-model-len 4096", {}, "max_model_len = 4096: the model was made for at most 2048"),
    ("nonet-tiny --max-num-batched-tokens 8", {}, "max_num_batched_tokens = 8: must be at least max_num_seqs (128)"),
    ("nonet-tiny --kv-cache-memory-bytes 8", {}, "kv_cache_memory_bytes = 8: one block needs"),
    ("nonet-tiny --device cuda -dp 999", {}, "device = 'cuda': needs 999 GPUs"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "files", "line"), MISTAKES, ids=[line for _, _, line in MISTAKES])
def test_a_mistake_is_one_line(start, tmp_path, arguments, files, line):
    """Shown by `--print-config` too, but for GPUs, which that does not need."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = ["generate", "-p", "a"] if "cuda" in arguments else ["serve", "--print-config"]
    code, out, err = start(*command, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("VLLM_RANDOMIZE_DP_DUMMY_INPUTS", "maybe", "use 0 or 1"),
        ("VLLM_MOE_DP_CHUNK_SIZE", "0", "use a positive count"),
        ("EXPERT_STATISTIC_ITER_RANGE", "200-100", "use START-STOP, as in 100-200 for iterations 100 to 199"),
        ("OMP_NUM_THREADS", "two", "use a positive count"),
    ],
)
def test_a_variable(start, monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    assert start("serve", "nonet-tiny", "--print-config") == (2, "", f"error: {variable} = {value!r}: {remedy}\n")


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        ({"num_attention_heads": 0}, 3, "num_attention_heads = 0 must be a positive count"),
        (
            {"quantization_config": {"bits": 4}},
            3,
            "quantization_config.quant_method = None is not supported; supported: ",
        ),
        ({"torch_dtype": "float8_e4m3fn", "dtype": None}, 2, "dtype = 'float8_e4m3fn': use one of: float32, bfloat16"),
        ({"num_experts": 0}, 3, "num_experts = 0 is not supported; supported: Mixture-of-Experts models"),
    ],
)
def test_a_config_json_that_cannot_be_served(start, tmp_path, changes, code, line):
    left, out, err = start("serve", write_tiny(tmp_path / "m", **changes), "--print-config")
    assert (left, out) == (code, "")
    assert line in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_json_that_is_none(start, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    code, out, err = start("serve", str(tmp_path), "--print-config")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {tmp_path / 'config.json'} ")
    assert err.count("\n") == 1


@pytest.fixture
def no_privilege() -> Iterator[None]:
    """Root may read everything: this thread gives that up (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) and takes it back."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    had = sets[0]
    sets[0] = had & ~0b110
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = had
    assert libc.capset(header, sets) == 0


@pytest.mark.usefixtures("no_privilege")
@pytest.mark.parametrize(
    ("closed", "code", "line"),
    [
        ("model", 2, "model = '{}/model': cannot be read: Permission denied"),
        ("model/config.json", 3, "{}/model/config.json cannot be read: Permission denied"),
        ("a.yaml", 2, "--config = '{}/a.yaml': cannot be read: Permission denied"),
    ],
)
def test_no_permission(start, tmp_path, closed, code, line):
    write_tiny(tmp_path / "model")
    (tmp_path / "a.yaml").write_text("port: 1\n")
    (tmp_path / closed).chmod(0)
    model, config = str(tmp_path / "model"), str(tmp_path / "a.yaml")
    shown = start("serve", model, "--config", config, "--print-config")
    (tmp_path / closed).chmod(0o755)
    assert shown == (code, "", f"error: {line.format(tmp_path)}\n")


def _truncated(folder: Path) -> None:
    with open(TINY / "model.safetensors", "rb") as whole:
        (folder / "model.safetensors").write_bytes(whole.read(3_000_000))


def _no_shard(folder: Path) -> None:
    names = load_file(TINY / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_shape(folder: Path) -> None:
    os.symlink(TINY / "model.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 9000}))


def _smaller_than_stored(key: str, size: int) -> Callable[[Path], None]:
    """config.json asks for less than the checkpoint holds: read as it says, it would be cut without a word."""

    def spoil(folder: Path) -> None:
        os.symlink(TINY / "model.safetensors", folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: size}))

    return spoil


def _other_type(folder: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_truncated, "{}/model.safetensors cannot be read (truncated?): "),
        (_no_shard, "{}/model-00001-of-00002.safetensors is missing, and this rank needs tensors from it"),
        (lambda folder: None, "{} holds neither model.safetensors nor model.safetensors.index.json"),
        (_other_shape, "{}: tensor 'model.embed_tokens.weight' has shape [8192, 256], too small for its config.json"),
        (
            _smaller_than_stored("vocab_size", 8000),
            "{}: tensor 'model.embed_tokens.weight' has shape [8192, 256], too la",
        ),
        (
            _smaller_than_stored("moe_intermediate_size", 32),
            "{}: tensor 'model.layers.0.mlp.experts.0.gate_proj.weight'",
        ),
        (_other_type, "{}/model.safetensors: tensor 'model.norm.weight' has dtype I64, which is not supported"),
    ],
    ids=["truncated", "missing shard", "no weights", "wrong shape", "large vocabulary", "wide experts", "wrong dtype"],
)
def test_weights_that_a_rank_cannot_use(start, tmp_path, request, spoil, line):
    """The rank that found it says nothing itself, and the command ends with exit code 3."""
    if request.config.pluginmanager.has_plugin("_fast"):
        pytest.skip("starts a rank process")
    folder = write_tiny(tmp_path / "m")
    spoil(tmp_path / "m")
    code, out, err = start("generate", folder, "-p", "a", "--device", "cpu", "--num-blocks", "8")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {line.format(folder)}")
    assert err.count("\n") == 1
