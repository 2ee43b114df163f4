"""The table of load statistics: TensorRT-LLM's measures and form, and the picture."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from nonet.eplb.picture import draw
from nonet.eplb.report import report, table
from nonet.errors import ConfigError

# The figures and the form of TensorRT-LLM's ep_load_balancer/README.md, without the rows it leaves out.
PUBLISHED = """\
           mean         std  imbalance-ratio
3        1024.0  187.955200         0.498043
4        1024.0  202.728516         0.537602
5        1024.0  209.339981         0.458676
average  1024.0  200.007899         0.498107"""


def test_the_table_looks_as_published():
    columns = {
        "mean": np.full(3, 1024.0),
        "std": np.array([187.9552, 202.728516, 209.339981]),
        "imbalance-ratio": np.array([0.498043, 0.537602, 0.458676]),
    }
    assert table([3, 4, 5], columns) == PUBLISHED


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.0], ["0.0", "0.0", "0.0"]),
        ([0.5, 1.25], ["0.500", "1.250", "0.875"]),
        ([1 / 3, 1.0], ["0.333333", "1.000000", "0.666667"]),
        ([10.0, 20.0], ["10.0", "20.0", "15.0"]),
    ],
)
def test_digits_that_nobody_needs_are_left_out(values, wanted):
    rows = table([0, 1], {"x": np.array(values)}).splitlines()[1:]
    assert [row.split()[1] for row in rows] == wanted


LOAD_NLX = np.array([[[4.0, 2.0, 0.0]], [[3.0, 3.0, 12.0]]])


def test_measures_by_hand():
    """Each in every iteration, then averaged: (4 / 2 - 1 + 12 / 6 - 1) / 2; deviations with N - 1."""
    found = report(LOAD_NLX, [7], 100)
    assert found.mean_L.tolist() == [4.0]
    assert found.imbalance_L.tolist() == [1.0]
    assert found.std_L == pytest.approx([(2.0 + np.sqrt(27.0)) / 2])
    assert found.of_sum_L == pytest.approx([12 / (24 / 3) - 1])
    assert found.share_LX == pytest.approx(np.array([[7, 5, 12]]) / 8)
    assert found.text().splitlines()[0] == "Load statistics:"


def test_an_iteration_without_tokens_says_nothing():
    idle = np.concatenate([LOAD_NLX, np.zeros((3, 1, 3))])
    assert report(idle, [7]).columns["imbalance-ratio"].tolist() == [1.0]
    assert report(idle, [7]).mean_L.tolist() == [4.0]
    assert report(np.zeros((2, 1, 3)), [7]).imbalance_L.tolist() == [0.0]


def test_numbers_for_programs():
    found = json.loads(json.dumps(report(LOAD_NLX, [7], 100).as_dict()))
    assert (found["iter_start"], found["iter_stop"]) == (100, 102)
    assert found["layers"].keys() == {"7"}
    assert found["layers"]["7"] == found["average"]
    assert found["average"].keys() == {"mean", "std", "imbalance_ratio", "imbalance_ratio_of_sum"}
    assert found["average"]["imbalance_ratio"] == 1.0


def test_one_rank_has_nothing_to_compare_with():
    with pytest.raises(ConfigError, match=r"^ranks = 1: there is nothing to compare; use --per_expert, or --ep_size"):
        report(np.ones((2, 1, 1)), [0])


def test_the_picture_is_svg_with_a_cell_for_each_rank_and_layer():
    rng = np.random.default_rng(0)
    one, two = (report(rng.integers(0, 9, (5, layers, 4)).astype(float), range(layers)) for layers in (3, 2))
    text = draw([("before & <after>", one), ("after", two)])
    tree = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert tree.tag == f"{svg}svg"
    cells = [rect for rect in tree.iter(f"{svg}rect") if rect.find(f"{svg}title") is not None]
    assert len(cells) == 3 * 4 + 2 * 4
    shown = [node.text for node in tree.iter(f"{svg}text")]
    assert "before & <after>" in shown
    assert f"{one.imbalance_L.mean():.3f}" in shown
    assert {node.text for node in tree.iter(f"{svg}title")} >= {f"layer 0, rank 0: {one.share_LX[0, 0]:.3f}"}


@pytest.mark.parametrize(("share", "colour"), [(0.0, "#053061"), (1.0, "#f7f7f7"), (2.0, "#b2182b"), (9.0, "#67001f")])
def test_colours(share, colour):
    """Of the first of twelve ranks, whose mean is 1."""
    load = np.array([[[share] + [(12.0 - share) / 11] * 11]])
    cells = [line for line in draw([("x", report(load, [0]))]).splitlines() if "rank 0:" in line]
    assert len(cells) == 1
    assert f'fill="{colour}"' in cells[0]
