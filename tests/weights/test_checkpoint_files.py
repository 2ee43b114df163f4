"""Reading tensors from safetensors folders: whole and in parts, sharded, with files absent, cut off, or wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from nonet.errors import ModelError
from nonet.weights.loader import Checkpoint

CPU = torch.device("cpu")


def table(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=dtype).view(rows, columns)


def opened(folder, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(folder, dtype, CPU)


@pytest.fixture
def single(tmp_path):
    tensors = {"a": table(6, 4), "half": table(2, 3, torch.bfloat16), "v": torch.arange(5.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """Three shards; the index also names one that is not there."""
    shards = {"one.safetensors": {"a": table(6, 4)}, "two.safetensors": {"b": table(2, 2)}}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    weight_map["far"] = "three.safetensors"
    weight_map["ghost"] = "two.safetensors"
    write_index(tmp_path, {"metadata": {}, "weight_map": weight_map})
    return tmp_path


def write_index(folder, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_whole_tensor(single):
    checkpoint = opened(single)
    assert torch.equal(checkpoint.read("a"), table(6, 4))
    assert "a" in checkpoint
    assert "b" not in checkpoint


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((1, 3), None), (None, (1, 4)), ((0, 6), (0, 4)), ((2, 5), (3, 4)), ((3, 3), None), (None, (2, 2))],
)
def test_a_part_is_what_slicing_gives_and_no_more_is_read(single, rows, columns):
    checkpoint = opened(single)
    wanted = table(6, 4)[slice(*(rows or (0, 6))), slice(*(columns or (0, 4)))]
    got = checkpoint.read("a", rows=rows, columns=columns)
    assert torch.equal(got, wanted)
    assert got.is_contiguous()
    assert checkpoint.bytes_read == wanted.numel() * 4


def test_a_part_of_a_vector(single):
    assert opened(single).read("v", rows=(2, 4)).tolist() == [2.0, 3.0]


def test_bytes_add_up_in_the_type_of_the_file(single):
    checkpoint = opened(single)
    assert checkpoint.bytes_read == 0, "opening reads no tensor"
    assert checkpoint.read("half").dtype == torch.float32
    assert checkpoint.bytes_read == 6 * 2
    checkpoint.read("a", rows=(0, 2))
    assert checkpoint.bytes_read == 12 + 8 * 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_plain_weight_is_refused(tmp_path, dtype):
    """Not turned into numbers that mean something else."""
    save_file({"a": torch.ones(4, 2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="tensor 'a' has dtype .*, which is not supported; supported: F32, BF16"):
        opened(tmp_path).read("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_in_the_wanted_type(single, dtype):
    got = opened(single, dtype).read("a")
    assert got.dtype == dtype
    assert torch.equal(got, table(6, 4).to(dtype))


def test_shards_are_found_by_the_index(sharded):
    checkpoint = opened(sharded)
    assert torch.equal(checkpoint.read("a"), table(6, 4))
    assert torch.equal(checkpoint.read("b"), table(2, 2))


def test_an_absent_shard_matters_only_to_who_needs_it(sharded):
    (sharded / "two.safetensors").unlink()
    checkpoint = opened(sharded)
    assert torch.equal(checkpoint.read("a", rows=(0, 1)), table(6, 4)[:1])
    assert "b" in checkpoint, "it is somewhere"
    with pytest.raises(ModelError, match=r"two\.safetensors is missing, and this rank needs tensors from it"):
        checkpoint.read("b")
    with pytest.raises(ModelError, match=r"three\.safetensors is missing"):
        checkpoint.read("far")


def test_a_tensor_nobody_has(single, tmp_path):
    with pytest.raises(ModelError, match=r"tensor 'nope' is missing"):
        opened(single).read("nope")


def test_a_tensor_that_the_index_promises_in_vain(sharded):
    with pytest.raises(ModelError, match=r"two\.safetensors: tensor 'ghost' is missing, though the index names it"):
        opened(sharded).read("ghost")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_file_that_was_cut_off(single, keep):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read \(truncated\?\)"):
        opened(single).read("a")


def test_a_shard_that_was_cut_off_is_noticed_when_it_is_needed(sharded):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    checkpoint = opened(sharded)
    assert checkpoint.read("a").shape == (6, 4)
    with pytest.raises(ModelError, match=r"two\.safetensors cannot be read"):
        checkpoint.read("b")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', "3"])
def test_a_broken_index(tmp_path, content):
    write_index(tmp_path, content)
    with pytest.raises(ModelError, match=r"index\.json is not a safetensors index"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("a", {"rows": (0, 7)}),
        ("a", {"columns": (2, 5)}),
        ("a", {"rows": (6, 8), "columns": (0, 1)}),
        ("v", {"columns": (0, 1)}),
    ],
)
def test_a_part_beyond_the_tensor_means_that_config_json_is_wrong(single, name, span):
    with pytest.raises(ModelError, match=rf"tensor '{name}' has shape .*, too small for its config\.json"):
        opened(single).read(name, **span)


def test_expect_holds_a_tensor_to_its_shape(single):
    assert opened(single).expect("a", (6, 4)).shape == (6, 4)
    with pytest.raises(ModelError, match=r"tensor 'a' has shape \[6, 4\], expected \[4, 6\]"):
        opened(single).expect("a", (4, 6))


def test_a_closed_checkpoint_lets_its_files_go(single):
    import psutil

    def maps() -> int:
        return sum(str(single) in m.path for m in psutil.Process().memory_maps())

    checkpoint = opened(single)
    checkpoint.read("a")
    assert maps() == 1
    checkpoint.close()
    assert maps() == 0
