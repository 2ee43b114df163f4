"""Slots filled from a checkpoint: the right experts in the right slots, whole or in slices, and nothing else read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nonet.errors import ModelError
from nonet.weights.loader import Checkpoint
from nonet.weights.slots import fill_slots

E, WIDTH, HIDDEN = 4, 6, 5  # experts, intermediate width, hidden


def names(expert: int) -> tuple[str, str, str]:
    return f"{expert}.gate", f"{expert}.up", f"{expert}.down"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return {f"{e}.{n}": torch.randn(s, generator=generator) for e in range(E) for n, s in shapes.items()}


@pytest.fixture
def checkpoint(tensors, tmp_path) -> Checkpoint:
    return save(tensors, tmp_path)


def save(tensors, folder) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [2], [3, 1], [1, 1, 0]])
def test_each_slot_holds_its_expert(tensors, checkpoint, experts):
    slots = fill_slots(checkpoint, names, experts, (0, WIDTH))
    assert len(slots.gate_up) == len(slots.down) == len(experts)
    for slot, expert in enumerate(experts):
        gate, up, down = (tensors[name] for name in names(expert))
        assert torch.equal(slots.gate_up[slot], torch.cat([gate, up])), "gate above up"
        assert torch.equal(slots.down[slot], down)
    assert checkpoint.bytes_read == len(experts) * 3 * WIDTH * HIDDEN * 4


@pytest.mark.parametrize("span", [(0, 2), (2, 5), (5, 6)])
def test_a_slice_of_the_width(tensors, checkpoint, span):
    slots = fill_slots(checkpoint, names, [1], span)
    gate, up, down = (tensors[name] for name in names(1))
    assert torch.equal(slots.gate_up[0], torch.cat([gate[slice(*span)], up[slice(*span)]]))
    assert torch.equal(slots.down[0], down[:, slice(*span)])
    assert checkpoint.bytes_read == 3 * (span[1] - span[0]) * HIDDEN * 4


def test_slices_over_ranks_add_up_to_the_expert(tensors, checkpoint):
    """The sum over slices of down(silu(gate x) * up x) is the whole expert's output."""
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))

    def run(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.t()

    whole = fill_slots(checkpoint, names, [2], (0, WIDTH))
    parts = [fill_slots(checkpoint, names, [2], span) for span in ((0, 2), (2, 4), (4, 6))]
    summed = sum(run(p.gate_up[0], p.down[0]) for p in parts)
    torch.testing.assert_close(summed, run(whole.gate_up[0], whole.down[0]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("1.gate", (WIDTH, HIDDEN + 1)),
        ("0.up", (WIDTH, HIDDEN - 1)),
        ("1.down", (HIDDEN + 1, WIDTH)),
        ("1.down", (1, WIDTH)),
    ],
)
def test_tensors_that_do_not_fit_together_are_a_model_error(tensors, tmp_path, name, shape):
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ModelError, match=rf"{name[0]}\.gate, .* do not fit together"):
        fill_slots(save(tensors, tmp_path), names, [0, 1], (0, WIDTH))


@pytest.mark.parametrize("name", ["2.gate", "2.up", "2.down"])
def test_a_narrow_expert_is_a_model_error(tensors, tmp_path, name):
    tensors[name] = tensors[name][: WIDTH - 1, : WIDTH - 1].contiguous()
    with pytest.raises(ModelError, match=rf"tensor '{name}' has shape"):
        fill_slots(save(tensors, tmp_path), names, [2], (0, WIDTH))


def test_an_expert_that_is_not_there_is_a_model_error(checkpoint):
    with pytest.raises(ModelError, match=r"tensor '9\.gate' is missing"):
        fill_slots(checkpoint, names, [9], (0, WIDTH))


def test_slots_that_adjoin_share_their_memory_with_the_stack(checkpoint):
    slots = fill_slots(checkpoint, names, [3, 0], (0, WIDTH))
    assert slots.stacked is not None
    for stack, views in zip(slots.stacked, (slots.gate_up, slots.down), strict=True):
        assert [view.data_ptr() for view in views] == [part.data_ptr() for part in stack]
