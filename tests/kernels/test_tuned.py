"""Tables of tiles: what is read, how a bucket is found, and that every shipped entry is a tile a kernel can have."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nonet.testing.expert_layers import SHAPES, routed

pytest.importorskip("triton")

from nonet.kernels.triton import tuned  # noqa: E402
from nonet.kernels.triton.tiling import Tile  # noqa: E402
from nonet.kernels.triton.tuned import Bucket, Layer  # noqa: E402

SHIPPED = sorted(tuned.FOLDER.glob("*.json"))
SMALL, LARGE = Tile(16, 64, 128, 4, 3, True), Tile(128, 128, 64, 8, 4, False, 1, True)
SHARED_MEMORY = 227 * 1024  # bytes a program can have, from Hopper on


def test_a_table_is_read_as_it_was_written(tmp_path):
    layer = Layer(8, 256, 128, "bfloat16", (Bucket(0.5, SMALL, SMALL), Bucket(64, LARGE, LARGE)))
    bucket = {"pairs_a_slot": 0.5, "gate_up": [16, 64, 128, 4, 3, True, 0], "down": [16, 64, 128, 4, 3, True]}
    many = {
        "pairs_a_slot": 64,
        "gate_up": [128, 128, 64, 8, 4, False, 1, True],
        "down": [128, 128, 64, 8, 4, False, 1, True],
    }
    entry = {"slots": 8, "hidden": 256, "intermediate": 128, "dtype": "bfloat16", "buckets": [bucket, many]}
    tuned.path("Some GPU/8", tmp_path).write_text(json.dumps({"layers": [entry]}))
    assert (tmp_path / "Some_GPU_8.json").exists()
    assert tuned.load("Some GPU/8", tmp_path) == (layer,)


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_are_measured_have_a_table(name):
    shape, table = SHAPES[name], tuned.load("NVIDIA H100 80GB HBM3")
    dtype = str(shape.dtype).removeprefix("torch.")
    layer = tuned.find(table, shape.slots, shape.hidden, shape.width, dtype)
    assert layer is not None
    assert len(layer.buckets) >= len(shape.tokens)
    x_ND, slot_NK, weight_NK = routed(shape, 8, "cpu")
    assert x_ND.shape == (len(slot_NK), shape.hidden)
    assert slot_NK.shape == weight_NK.shape == (len(slot_NK), shape.top_k)
    assert (slot_NK.amax(1) >= 0).all(), "rows without any of the slots do not come"
    assert slot_NK.max() < shape.slots


def test_an_unknown_device_or_shape_has_none(tmp_path):
    assert tuned.load("Some GPU", tmp_path) == ()
    layer = Layer(8, 256, 128, "bfloat16", (Bucket(1.0, SMALL, SMALL),))
    assert tuned.find((), 8, 256, 128, "bfloat16") is None
    assert tuned.find((layer,), 8, 256, 128, "float8_e4m3fn") is None
    assert tuned.find((layer,), 8, 256, 64, "bfloat16") is None


def test_the_nearest_slots_and_pairs_are_taken_by_ratio():
    layers = tuple(
        Layer(slots, 256, 128, "bfloat16", (Bucket(1, SMALL, SMALL), Bucket(100, LARGE, LARGE))) for slots in (8, 128)
    )
    assert tuned.find(layers, 30, 256, 128, "bfloat16") is layers[0]
    assert tuned.find(layers, 40, 256, 128, "bfloat16") is layers[1]
    assert layers[0].nearest(0).gate_up is SMALL
    assert layers[0].nearest(9).gate_up is SMALL
    assert layers[0].nearest(11).gate_up is LARGE
    assert layers[0].nearest(1e9).gate_up is LARGE


def test_the_tool_replaces_what_it_tuned_again_and_keeps_the_rest(tmp_path):
    path = Path(__file__).parents[2] / "tools" / "tune_experts.py"
    spec = importlib.util.spec_from_file_location("tune_experts", path)
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # its dataclasses look themselves up
    spec.loader.exec_module(tool)
    kept, old, new = (
        Layer(slots, 256, 128, "bfloat16", (Bucket(0.5, tile, LARGE), Bucket(8, LARGE, tile)))
        for slots, tile in ((8, SMALL), (16, SMALL), (16, LARGE))
    )
    assert tool.write("Some GPU", [old, kept], tmp_path) == tuned.path("Some GPU", tmp_path)
    tool.write("Some GPU", [new], tmp_path)
    assert tuned.load("Some GPU", tmp_path) == (kept, new)
    between = Layer(16, 256, 128, "bfloat16", (Bucket(2, SMALL, SMALL), Bucket(8, SMALL, SMALL)))
    tool.write("Some GPU", [between], tmp_path)
    assert tuned.load("Some GPU", tmp_path)[1].buckets == (new.buckets[0], *between.buckets)


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_every_shipped_entry_is_a_tile_that_a_kernel_can_have(file):
    table = json.loads(file.read_text())
    assert tuned.path(table["device"]) == file
    layers = tuned.load(table["device"])
    assert layers
    for layer in layers:
        assert [b.pairs_a_slot for b in layer.buckets] == sorted({b.pairs_a_slot for b in layer.buckets})
        size = {"bfloat16": 2, "float8_e4m3fn": 1}[layer.dtype]
        for bucket in layer.buckets:
            for tile, weights in ((bucket.gate_up, 2), (bucket.down, 1)):
                assert all(n & (n - 1) == 0 for n in (tile.BM, tile.BN, tile.BK, tile.warps))
                assert min(tile.BM, tile.BN, tile.BK) >= 16
                assert tile.stages >= 1
                assert not (tile.swap and tile.halve)
                held = (tile.stages - 1) * tile.BK * (tile.BM + weights * tile.BN) * size  # by some products one more
                assert held <= SHARED_MEMORY
            if layer.dtype == "float8_e4m3fn":
                assert bucket.gate_up.BN == 128
                assert bucket.down.BN <= 256
                assert bucket.gate_up.BK % 128 == bucket.down.BK % 128 == 0
