"""The recorder of a rank by itself: when it counts, and what happens to the service when its folder goes away."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nonet.config import build_config
from nonet.engine.statistics import Recorder
from nonet.eplb.placement import Placement
from nonet.eplb.statistics import read_statistics
from nonet.moe.load import LoadCounter

PLACEMENT = Placement.contiguous(1, 4, 1, 6)
EXPERTS, SLOTS = torch.tensor([[0, 3]]), torch.tensor([[4, 3]])


@pytest.fixture
def recorder(tmp_path):
    """recorder(range): (the recorder, step), where a step is a token through the one MoE layer."""

    def make(iterations: str | None, folder: Path = tmp_path):
        config = build_config("m", expert_statistic_iter_range=iterations, expert_statistic_path=str(folder))
        load = LoadCounter(1, 4, torch.device("cpu"))
        spec, world = SimpleNamespace(moe_layers=(2,), top_k=2), SimpleNamespace(rank=0, size=1)
        made = Recorder(config, spec, world, PLACEMENT, load)

        def step() -> bool:
            """Whether slots were counted."""
            counting = load.slot_LG is not None
            load.add(0, EXPERTS, SLOTS)
            made.end_iteration()
            return counting

        return made, step

    return make


def test_slots_are_counted_only_in_the_iterations_asked_for(recorder, tmp_path, caplog):
    _, step = recorder("2-4")
    assert [step() for _ in range(6)] == [False, False, True, True, False, False]
    found = read_statistics(tmp_path)
    assert (found.first_iteration, found.layers) == (2, (2,))
    assert found.count_NRLG.tolist() == [[[[0, 0, 0, 1, 1, 0]]]] * 2
    assert caplog.messages == [], "all is there: nothing to warn of"


def test_the_first_iteration_can_be_counted(recorder, tmp_path):
    made, step = recorder("0-9")
    assert step()
    made.close()
    made.close()
    assert read_statistics(tmp_path).num_iterations == 1


def test_without_a_range_nothing_is_counted_or_made(recorder, tmp_path, caplog):
    made, step = recorder(None, tmp_path / "none")
    assert not step()
    made.close()
    assert not (tmp_path / "none").exists()
    assert caplog.messages == []


@pytest.mark.parametrize("when", ["before", "within", "at the end"])
def test_a_folder_that_goes_away_ends_the_recording_and_not_the_service(recorder, tmp_path, caplog, when):
    folder = tmp_path / "gone"
    made, step = recorder("1-3", folder)
    for n in range(4):
        if n == {"before": 1, "within": 2, "at the end": 3}[when]:
            shutil.rmtree(folder)
            folder.write_text("a file in its place")
        step()
    made.close()
    said = [message for message in caplog.messages if "rank 0 cannot write, recording ends" in message]
    assert len(said) == {"before": 1, "within": 1, "at the end": 0}[when], caplog.messages
