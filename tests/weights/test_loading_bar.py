"""The bar of layers: on terminals only, and what it says in the end."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from nonet.weights.loader import Checkpoint
from nonet.weights.progress import LoadingBar


def load(folder, bar: LoadingBar) -> None:
    save_file({f"model.layers.{n}.a": torch.ones(2, 3) for n in range(12)}, folder / "model.safetensors")
    with bar:
        checkpoint = Checkpoint(folder, torch.float32, torch.device("cpu"), watch=bar)
        for n in range(12):
            checkpoint.read(f"model.layers.{n}.a")
        bar.done(checkpoint)
        checkpoint.close()


def test_layers_are_counted_and_the_end_is_told(tmp_path):
    out = io.StringIO()
    bar = LoadingBar(12, console=Console(file=out, force_terminal=True, width=100))
    seen = []
    update = bar._bar.update
    bar._bar.update = lambda task, completed: (seen.append(completed), update(task, completed=completed))
    load(tmp_path, bar)
    assert seen == list(range(1, 12)), "a layer is done when the next begins"
    assert "loading" in out.getvalue()
    last = out.getvalue().splitlines()[-1]
    assert re.search(rf"read 0\.0 MiB of {re.escape(str(tmp_path))} in \d+\.\d s, at most 0\.0 MiB on its way", last)


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_said_where_no_terminal_is(tmp_path, capfd, wanted):
    load(tmp_path, LoadingBar(12, wanted=wanted))
    assert capfd.readouterr() == ("", "")


def test_an_error_ends_the_bar(tmp_path):
    out = io.StringIO()
    bar = LoadingBar(3, console=Console(file=out, force_terminal=True, width=100))
    with pytest.raises(ValueError, match="broken"), bar:
        raise ValueError("broken")
    assert bar._bar.live.is_started is False
