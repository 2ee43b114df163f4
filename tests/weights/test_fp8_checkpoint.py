"""Checkpoints in FP8: dense weights come as what they stand for, slots keep the numbers and their factors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from nonet.errors import ModelError
from nonet.kernels.fp8 import FP8, dequantize, quantize
from nonet.weights import loader
from nonet.weights.loader import SCALE, Checkpoint
from nonet.weights.slots import fill_slots

E, WIDTH, HIDDEN, BLOCK = 3, 40, 50, 16  # no width is a multiple of the block


def names(expert: int) -> tuple[str, str, str]:
    return f"{expert}.gate", f"{expert}.up", f"{expert}.down"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    plain = {f"{e}.{n}": torch.randn(s, generator=generator) * (e + 1) for e in range(E) for n, s in shapes.items()}
    out = {}
    for name, weight in plain.items():
        out[name], out[name + SCALE] = quantize(weight, BLOCK)
    return out | {"norm": torch.randn(HIDDEN, generator=generator)}


def save(tensors, folder, dtype=torch.float32, config=True, block=BLOCK) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    if config:
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Checkpoint(folder, dtype, torch.device("cpu"))


def whole(tensors, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize(tensors[name], tensors[name + SCALE], BLOCK, dtype)


# -- dense weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1 << 20, 3 * HIDDEN, 1])
@pytest.mark.parametrize("rows", [None, (0, 16), (3, 33), (39, 40), (7, 7)])
@pytest.mark.parametrize("columns", [None, (16, 32), (5, 50)])
def test_a_dense_weight_comes_as_what_it_stands_for(tensors, tmp_path, monkeypatch, rows, columns, piece_bytes):
    """However large the pieces are in which it is read."""
    monkeypatch.setattr(loader, "PIECE_BYTES", piece_bytes)
    checkpoint = save(tensors, tmp_path)
    want = whole(tensors, "1.gate")[slice(*(rows or (None,))), slice(*(columns or (None,)))]
    assert torch.equal(checkpoint.read("1.gate", rows, columns), want)
    assert checkpoint.staged <= max(piece_bytes, want.shape[1] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_type_of_the_model(tensors, tmp_path, dtype):
    got = save(tensors, tmp_path, dtype).read("0.down")
    assert got.dtype == dtype
    assert torch.equal(got, whole(tensors, "0.down", dtype))


def test_plain_tensors_beside_them_are_as_ever(tensors, tmp_path):
    assert torch.equal(save(tensors, tmp_path).read("norm"), tensors["norm"])


def test_factors_may_be_stored_in_bfloat16(tensors, tmp_path):
    tensors = {n: t.bfloat16() if n.endswith(SCALE) else t for n, t in tensors.items()}
    want = dequantize(tensors["0.up"], tensors["0.up" + SCALE].float(), BLOCK, torch.float32)
    assert torch.equal(save(tensors, tmp_path).read("0.up"), want)


def test_bytes_count_numbers_and_factors(tensors, tmp_path):
    checkpoint = save(tensors, tmp_path)
    checkpoint.read("1.gate", rows=(15, 17))
    assert checkpoint.bytes_read == 2 * HIDDEN + 2 * 4 * 4, "two rows in two blocks of rows, four of columns"


# -- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0, WIDTH), (0, 16), (16, 40), (5, 19), (39, 40), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_keep_fp8_and_stand_for_the_same_numbers(tensors, tmp_path, span, dtype):
    """Also slices that begin inside a block."""
    checkpoint = save(tensors, tmp_path, dtype)
    experts, own, width = [2, 0, 2], slice(*span), span[1] - span[0]
    slots = fill_slots(checkpoint, names, experts, span)
    assert not slots.plain
    for slot, expert in enumerate(experts):
        assert slots.gate_up[slot].dtype == slots.down[slot].dtype == FP8
        gate, up, down = (whole(tensors, name, dtype) for name in names(expert))
        gate_up_got, down_got = slots.matrices(slot, dtype)
        assert torch.equal(gate_up_got, torch.cat([gate[own], up[own]]))
        assert torch.equal(down_got, down[:, own])
    blocks = -(-span[1] // BLOCK) - span[0] // BLOCK
    size = len(experts) * (3 * width * HIDDEN + 3 * 4 * blocks * 4)
    assert slots.nbytes == size, "a byte a number, and float32 for each block"
    assert checkpoint.bytes_read == size, "and no more is read"


def test_a_whole_expert_takes_half_of_what_it_does_in_bfloat16(tensors, tmp_path):
    plain_tensors = {name: torch.zeros(t.shape) for name, t in tensors.items() if not name.endswith(SCALE)}
    (tmp_path / "plain").mkdir()
    plain = fill_slots(save(plain_tensors, tmp_path / "plain", torch.bfloat16), names, [0, 1], (0, WIDTH))
    slots = fill_slots(save(tensors, tmp_path, torch.bfloat16), names, [0, 1], (0, WIDTH))
    assert 2 * (slots.nbytes - 2 * 3 * 4 * 3 * 4) == plain.nbytes


# -- what is refused ----------------------------------------------------------------------------------------------


def test_without_factors(tensors, tmp_path):
    del tensors["1.up" + SCALE]
    checkpoint = save(tensors, tmp_path)
    message = r"tensor '1\.up' has dtype F8_E4M3, .* supported: .* beside a tensor '1\.up_scale_inv'"
    with pytest.raises(ModelError, match=message):
        checkpoint.read("1.up")
    with pytest.raises(ModelError, match="differ in width or in being FP8"):
        fill_slots(checkpoint, names, [0, 1], (0, WIDTH))


def test_a_config_that_says_nothing_of_it(tensors, tmp_path):
    checkpoint = save(tensors, tmp_path, config=False)
    for call in (lambda: checkpoint.read("0.up"), lambda: fill_slots(checkpoint, names, [0], (0, WIDTH))):
        with pytest.raises(ModelError, match=r"config\.json: no quantization_config, but tensor '0\..*' is in FP8"):
            call()


def test_factors_for_other_blocks(tensors, tmp_path):
    checkpoint = save(tensors, tmp_path, block=128)
    message = r"tensor '0\.up_scale_inv' has shape \[3, 4\], expected \[1, 1\]: a factor for each block of 128 x 128"
    with pytest.raises(ModelError, match=message):
        checkpoint.read("0.up")


def test_experts_of_which_some_are_plain(tensors, tmp_path):
    for name in names(1):
        tensors[name] = whole(tensors, name)
    checkpoint = save(tensors, tmp_path)
    assert fill_slots(checkpoint, names, [1], (0, WIDTH)).plain
    with pytest.raises(ModelError, match=r"experts from 0\.gate to 1\.down differ in width or in being FP8"):
        fill_slots(checkpoint, names, [0, 1], (0, WIDTH))


def test_three_dimensions(tmp_path):
    tensors = {"a": torch.zeros(2, 4, 4).to(FP8), "a" + SCALE: torch.ones(2, 1, 1)}
    with pytest.raises(ModelError, match=r"tensor 'a_scale_inv' has shape \[2, 1, 1\], .* of a matrix"):
        save(tensors, tmp_path).read("a", index=0)
