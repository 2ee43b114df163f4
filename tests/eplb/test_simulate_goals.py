"""The balancer's goals on quality, as `benchmarks/eplb.py` measures them, on fewer seeds: no figure is missed.

Times are left to the benchmark.
"""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
LAYERS, SEEDS = 8, 2


@pytest.fixture
def suites(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _eplb_moves
    import _eplb_plans
    import _eplb_rows
    import _eplb_steps

    return _eplb_plans, _eplb_steps, _eplb_moves, _eplb_rows


def judged(rows, least):
    """The rows that have a verdict: at least so many, and none missed."""
    found = [row for row in rows if row.verdict]
    assert len(found) >= least
    assert not [f"{row.group} {row.what}: {row.measured} > {row.limit}" for row in found if row.verdict == "MISSED"]
    return found


def test_plans_are_near_their_bound(suites):
    plans, *_ = suites
    judged(plans.quality(SEEDS, plans.Shape()), 6)  # all layers: a single one may be harder than most
    judged(plans.few_slots(SEEDS, plans.Shape()), 11)


def test_steps_are_level(suites):
    plans, steps, *_ = suites
    judged(steps.steps(SEEDS, plans.Shape(LAYERS)), 5)
    judged(steps.correlated(SEEDS, plans.Shape(LAYERS)), 2)


def test_planning_again_moves_little(suites):
    plans, _, moves, _ = suites
    judged(moves.rebalancing(SEEDS, plans.Shape(LAYERS)), 5)


def test_advice_and_fleets_of_every_kind(suites):
    plans, *_ = suites
    judged(plans.advice(1, plans.Shape(LAYERS)), 1)
    judged(plans.every_fleet(1, plans.Shape(LAYERS)), 4)


def test_water_filling_to_the_end_is_exact(suites):
    plans, steps, *_ = suites
    exact = [row for row in steps.solver(SEEDS, plans.Shape(LAYERS)) if "to the end" in row.what]
    assert len(judged(exact, 3)) == 3


def test_a_missed_figure_is_seen(suites):
    rows = suites[3]
    assert [rows.Row("G1", "", measured, 1.0).verdict for measured in (1.0, 1.5, 1.6)] == ["goal", "required", "MISSED"]
    assert rows.Row("G1", "", 1.2, 1.0, required=1.0).verdict == "MISSED"
    assert rows.Row("G1", "", 9.9).verdict == ""
    assert "MISSED" in rows.text([rows.Row("G1", "a", 1.6, 1.0)])
