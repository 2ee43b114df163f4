"""Draws simulations as one SVG of bars: a group for each number of ranks and slots, a bar for each way to balance them.

Used by `nonet eplb simulate --plot`. Needs no library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nonet.eplb.picture import text

_BAR, _GAP, _HEIGHT, _LEFT, _TOP, _LINE = 22, 26, 220, 56, 36, 16
_COLOURS = ("#9e9e9e", "#4393c3", "#f4a582", "#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214")


def draw_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` are summaries of simulations: ranks, slots, policy, dispatch, imbalance_mean."""
    groups = list(dict.fromkeys((row["ranks"], row["slots"]) for row in rows))
    series = list(dict.fromkeys((row["policy"], row["dispatch"]) for row in rows))
    most = max([row["imbalance_mean"] for row in rows] + [1e-6])
    wide = len(series) * _BAR + _GAP
    width, height = _LEFT + len(groups) * wide + 240, _TOP + _HEIGHT + 48
    height = max(height, _TOP + len(series) * _LINE + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(_LEFT, 20, "imbalance, mean of steps and layers", size=14),
    ]
    for row in rows:
        group, bar = groups.index((row["ranks"], row["slots"])), series.index((row["policy"], row["dispatch"]))
        x = _LEFT + group * wide + bar * _BAR
        tall = _HEIGHT * row["imbalance_mean"] / most * 0.92
        y = _TOP + _HEIGHT - tall
        parts.append(
            f'<rect x="{x}" y="{y:.2f}" width="{_BAR - 2}" height="{tall:.2f}" fill="{_COLOURS[bar % len(_COLOURS)]}"/>'
        )
        parts.append(text(x + _BAR / 2 - 1, y - 3, _short(row["imbalance_mean"]), size=9, anchor="middle"))
    for number, (ranks, slots) in enumerate(groups):
        middle = _LEFT + number * wide + (wide - _GAP) / 2
        parts.append(text(middle, _TOP + _HEIGHT + 16, f"{ranks} ranks", anchor="middle"))
        parts.append(text(middle, _TOP + _HEIGHT + 30, f"{slots} slots", anchor="middle"))
    for number, (policy, dispatch) in enumerate(series):
        y, x = _TOP + number * _LINE, _LEFT + len(groups) * wide
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        parts.append(text(x + 17, y + 10, f"{policy}, {dispatch}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(value: float) -> str:
    return f"{value:.2f}"[1:] if 0.01 <= value < 1 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"[1:]
