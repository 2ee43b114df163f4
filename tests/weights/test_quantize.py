"""`nonet quantize`: what it writes, in what files, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nonet.cli.main import app
from nonet.errors import ConfigError, ModelError
from nonet.kernels.fp8 import FP8, dequantize, quantize
from nonet.weights import quantize as module
from nonet.weights.loader import SCALE, Checkpoint
from nonet.weights.quantize import quantize_folder

BLOCK = 16
LAYER = "model.layers.0"
QUANTIZED = {
    f"{LAYER}.self_attn.q_proj.weight": (40, 50),
    f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": (21, 50),
    f"{LAYER}.mlp.experts.0.gate_proj.weight": (33, 50),
    f"{LAYER}.mlp.experts.1.gate_proj.weight": (33, 50),
    f"{LAYER}.mlp.experts.10.down_proj.weight": (50, 33),
    f"{LAYER}.block_sparse_moe.experts.1.w2.weight": (50, 33),
    f"{LAYER}.mlp.shared_experts.up_proj.weight": (16, 16),
}
KEPT = {
    "model.embed_tokens.weight": (60, 50),
    "lm_head.weight": (60, 50),
    "model.norm.weight": (50,),
    f"{LAYER}.input_layernorm.weight": (50,),
    f"{LAYER}.mlp.gate.weight": (11, 50),
    f"{LAYER}.mlp.gate.e_score_correction_bias": (11,),
    f"{LAYER}.mlp.shared_expert_gate.weight": (1, 50),
    f"{LAYER}.self_attn.q_proj.bias": (40,),
    "model.layers.61.eh_proj.weight": (50, 100),
}


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source", tensors())


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in (QUANTIZED | KEPT).items()}


def write(folder: Path, content: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["A"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("the same weights in another form")
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {path.name for path in folder.glob("*.safetensors")} == set(files)
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert len(found) == sum(len(content) for content in files.values()), "the index names all there is"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


@pytest.mark.parametrize("piece_bytes", [1 << 20, 3000, 1])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000])
def test_experts_and_linear_layers_are_quantized_and_all_else_is_kept(
    source, tmp_path, monkeypatch, piece_bytes, shard_bytes
):
    """In one file or several, read in one piece or many."""
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    told = []
    target = tmp_path / "deep" / "target"
    done = quantize_folder(
        str(source), target, block=BLOCK, shard_bytes=shard_bytes, progress=lambda *now: told.append(now)
    )
    found, given = read_all(target), tensors()
    assert set(found) == set(QUANTIZED) | set(KEPT) | {name + SCALE for name in QUANTIZED}
    for name in QUANTIZED:
        numbers, scale = quantize(given[name], BLOCK)
        assert found[name].dtype == FP8
        assert torch.equal(found[name].view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(found[name + SCALE], scale)
    for name in KEPT:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], given[name])
    assert (done.quantized, done.kept) == (len(QUANTIZED), len(KEPT))
    assert done.bytes_before == sum(t.nbytes for t in given.values())
    assert done.bytes_after == sum(t.nbytes for t in found.values())
    assert (done.files > 1) == (shard_bytes == 5000)
    assert told[-1] == (done.bytes_before, done.bytes_before)
    assert done.piece_bytes <= max(piece_bytes, BLOCK * 100 * 2), "at least the rows of one block"


def test_no_file_is_larger_than_asked_for(source, tmp_path):
    quantize_folder(str(source), tmp_path / "target", block=BLOCK, shard_bytes=11000)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in (tmp_path / "target").glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 11000


def test_what_lies_beside_is_copied_but_not_other_forms_of_the_weights(source, tmp_path):
    (source / "figures").mkdir()
    quantize_folder(str(source), tmp_path / "target", block=BLOCK)
    names = {path.name for path in (tmp_path / "target").iterdir()}
    index = "model.safetensors.index.json"
    assert names == {"config.json", "tokenizer.json", index, "model-00001-of-00001.safetensors"}
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["architectures"] == ["A"]
    quantization = config["quantization_config"]
    assert set(quantization.pop("modules_to_not_convert")) == {
        "model.embed_tokens", "lm_head", f"{LAYER}.mlp.gate", f"{LAYER}.mlp.shared_expert_gate",
        "model.layers.61.eh_proj",
    }  # fmt: skip
    assert quantization == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip


def test_the_loader_reads_it(source, tmp_path):
    quantize_folder(str(source), tmp_path / "target", block=BLOCK)
    checkpoint = Checkpoint(tmp_path / "target", torch.float32, torch.device("cpu"))
    for name in QUANTIZED:
        want = dequantize(*quantize(tensors()[name], BLOCK), BLOCK, torch.float32)
        assert torch.equal(checkpoint.read(name), want)
    checkpoint.close()


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(source: Path | str, target: Path, error: type[Exception], message: str) -> None:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        quantize_folder(str(source), target, block=BLOCK)
    assert "\n" not in str(caught.value)
    assert sorted(target.parent.rglob("*")) == before, "nothing is left behind"


def test_a_target_with_something_in_it(source, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("")
    refused(
        source, tmp_path / "target", ConfigError, "DST = .*target': is there already; give a new or an empty folder"
    )
    refused(source, tmp_path / "target" / "a", ConfigError, "is there already")
    refused(source, source, ConfigError, "is there already")
    (tmp_path / "target" / "a").unlink()
    quantize_folder(str(source), tmp_path / "target", block=BLOCK)


def test_a_target_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    refused(source, tmp_path / "file" / "target", ConfigError, "DST = .*: cannot be written: ")


def test_a_full_disk(source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_numbers", full)
    refused(source, tmp_path / "target", ConfigError, "DST = .*: cannot be written: No space left on device")


def test_an_interrupt(source, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(str(source), tmp_path / "target", block=BLOCK, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == [source]


def test_no_such_source(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "target", ConfigError, "SRC = .*nowhere': no such folder")


def test_a_source_that_is_quantized_already(source, tmp_path):
    quantize_folder(str(source), tmp_path / "once", block=BLOCK)
    refused(
        tmp_path / "once", tmp_path / "twice", ModelError, "config.json: has a quantization_config: it is quantized"
    )
    config = tmp_path / "once" / "config.json"
    config.write_text("{}")
    refused(tmp_path / "once", tmp_path / "twice", ModelError, "has dtype F8_E4M3; supported: F32, BF16, F16, F64")


def test_experts_in_one_tensor(tmp_path):
    fused = {
        f"{LAYER}.mlp.experts.gate_up_proj": torch.ones(2, 4, 8),
        f"{LAYER}.self_attn.q_proj.weight": torch.ones(2, 2),
    }
    source = write(tmp_path / "source", fused)
    refused(
        source, tmp_path / "target", ModelError, "holds no experts with a tensor for each projection; experts in one"
    )


def test_numbers_that_are_not_finite(tmp_path):
    name = f"{LAYER}.mlp.experts.1.gate_proj.weight"
    content = tensors()
    content[name][32, 49] = torch.inf
    source = write(tmp_path / "source", content)
    refused(source, tmp_path / "target", ModelError, f"tensor '{name}' cannot be quantized: a number is not finite")


def test_a_source_whose_file_is_missing(source, tmp_path):
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "target", ModelError, "holds neither model.safetensors nor")


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        app(["quantize", str(source), str(tmp_path / "target"), "--max-shard-gib", "1"])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert f"target: {len(QUANTIZED)} of {len(QUANTIZED) + len(KEPT)} tensors in FP8, 1 file\n" in out
    assert "largest piece read 0.0 MiB" in out
    assert read_all(tmp_path / "target")
    with pytest.raises(SystemExit) as left:
        app(["quantize", str(source), str(tmp_path / "target")])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"error: DST = '{tmp_path / 'target'}': is there already; give a new or an empty folder\n"
    )
