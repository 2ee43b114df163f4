"""docs/models.md shows a family's file as it is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_file():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown == [(ROOT / "nonet" / "models" / "mixtral.py").read_text(encoding="utf-8")]


def test_the_page_names_every_option_of_attention():
    import inspect

    from nonet.layers.attention import Attention

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `Attention`"))
    given = {"self", "checkpoint", "prefix", "heads", "kv_heads", "head_dim", "norm_eps", "norm_weights"}
    options = set(inspect.signature(Attention.__init__).parameters) - given
    assert set(re.findall(r"`(\w+)`", row)) - {"Attention"} == options
