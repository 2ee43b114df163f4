"""Slots filled from tensors that hold all experts: transposed, interleaved, with biases, in slices."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nonet.errors import ModelError
from nonet.weights.fused import fill_fused_slots
from nonet.weights.loader import Checkpoint

E, WIDTH, HIDDEN = 4, 6, 5  # experts, intermediate width, hidden
SPANS = [(0, 6), (0, 2), (2, 5), (5, 6), (6, 6)]


def drawn(with_bias: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (E, HIDDEN, 2 * WIDTH), "down_proj": (E, WIDTH, HIDDEN)}
    if with_bias:
        shapes |= {"gate_up_proj_bias": (E, 2 * WIDTH), "down_proj_bias": (E, HIDDEN)}
    return {f"experts.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}


def save(tensors, folder) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, torch.float32, torch.device("cpu"))


def apart(both: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, the last dimension split."""
    return (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, dim=-1)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_slot_holds_its_expert(tmp_path, with_bias, interleaved, span):
    tensors = drawn(with_bias)
    checkpoint = save(tensors, tmp_path)
    experts, own, width = [3, 1, 3], slice(*span), span[1] - span[0]
    slots = fill_fused_slots(checkpoint, "experts", experts, span, interleaved=interleaved, activation="clamped")
    assert slots.activation == "clamped"
    assert len(slots.gate_up) == len(slots.down) == len(experts)
    for slot, expert in enumerate(experts):
        gate, up = (part[expert, :, own].t() for part in apart(tensors["experts.gate_up_proj"], interleaved))
        assert torch.equal(slots.gate_up[slot], torch.cat([gate, up]))
        assert torch.equal(slots.down[slot], tensors["experts.down_proj"][expert, own].t())
        assert slots.gate_up[slot].is_contiguous()
        assert slots.down[slot].is_contiguous()
        if with_bias:
            bias = [part[expert, own] for part in apart(tensors["experts.gate_up_proj_bias"], interleaved)]
            assert torch.equal(slots.biases(slot)[0], torch.cat(bias))
            want = tensors["experts.down_proj_bias"][expert]
            assert torch.equal(slots.biases(slot)[1], want if span[0] == 0 else torch.zeros(HIDDEN))
        else:
            assert slots.biases(slot) == (None, None)
    numbers = 3 * width * HIDDEN + with_bias * (2 * width + (HIDDEN if span[0] == 0 else 0))
    assert checkpoint.bytes_read == len(experts) * numbers * 4, "nothing of other experts or slices"


def test_a_rank_without_slots(tmp_path):
    slots = fill_fused_slots(save(drawn(), tmp_path), "experts", [], (0, WIDTH))
    assert slots.gate_up == slots.down == ()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate_up_proj", (E, HIDDEN), "expected three dimensions"),
        ("gate_up_proj", (E, HIDDEN, 2 * WIDTH - 1), "do not fit together"),
        ("gate_up_proj", (E, HIDDEN, 2 * WIDTH - 2), "do not fit together"),
        ("down_proj", (E, HIDDEN, WIDTH), "do not fit together"),
        ("gate_up_proj_bias", (E, WIDTH), "do not fit together"),
        ("down_proj_bias", (E, WIDTH), "do not fit together"),
    ],
)
def test_tensors_that_do_not_fit_together_are_a_model_error(tmp_path, name, shape, message):
    checkpoint = save(drawn() | {f"experts.{name}": torch.zeros(shape)}, tmp_path)
    with pytest.raises(ModelError, match=rf"gate_up_proj.* {message}"):
        fill_fused_slots(checkpoint, "experts", [0], (0, WIDTH))


def test_a_width_beyond_the_tensor_is_a_model_error(tmp_path):
    """Not the other half of gate_up."""
    with pytest.raises(ModelError, match="do not fit together"):
        fill_fused_slots(save(drawn(), tmp_path), "experts", [0], (0, WIDTH + 1))


def test_an_expert_that_is_not_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"tensor 'experts\.gate_up_proj' has shape .*, too small"):
        fill_fused_slots(save(drawn(), tmp_path), "experts", [E], (0, WIDTH))


def test_a_bias_without_its_other_is_a_model_error(tmp_path):
    tensors = drawn()
    del tensors["experts.down_proj_bias"]
    with pytest.raises(ModelError, match=r"tensor 'experts\.down_proj_bias' is missing"):
        fill_fused_slots(save(tensors, tmp_path), "experts", [0], (0, WIDTH))
