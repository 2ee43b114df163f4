"""Draws reports as one SVG: a row a layer, a column a rank, the colour its tokens against the mean. Needs no library.

Used by `nonet eplb report --plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nonet.eplb.report import Report

_WIDTH, _ROW, _LEFT, _RIGHT, _TOP, _GAP = 360, 16, 44, 64, 64, 24
_SCALE = (  # tokens / mean -> colour; finest near 1
    (0.0, (5, 48, 97)), (0.7, (67, 147, 195)), (1.0, (247, 247, 247)),
    (1.3, (244, 165, 130)), (2.0, (178, 24, 43)), (4.0, (103, 0, 31)),
)  # fmt: skip


def draw(reports: Sequence[tuple[str, Report]], what: str = "rank") -> str:
    """One panel a report, side by side, each below its title; `what` names the columns."""
    rows = max(len(report.layers) for _, report in reports)
    panel = _LEFT + _WIDTH + _RIGHT
    width, height = len(reports) * (panel + _GAP) + _GAP, _TOP + (rows + 1) * _ROW + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, report) in enumerate(reports):
        parts += _panel(_GAP + i * (panel + _GAP), title, report, what)
    return "\n".join([*parts, *_legend(_GAP + _LEFT, height - 30), "</svg>"]) + "\n"


def _panel(x: float, title: str, report: Report, what: str) -> list[str]:
    columns = report.share_LX.shape[1]
    cell = _WIDTH / columns
    right = x + _LEFT + _WIDTH
    parts = [
        text(x + _LEFT, 22, title, size=14),
        text(x + _LEFT, 40, f"{columns} {what}s, iterations {report.iterations.start} to {report.iterations.stop - 1}"),
        text(x + _LEFT - 6, _TOP - 6, "layer", anchor="end"),
        text(right + _RIGHT, _TOP - 6, "imbalance", anchor="end"),
    ]
    for row, layer in enumerate(report.layers):
        y = _TOP + row * _ROW
        parts.append(text(x + _LEFT - 6, y + 12, str(layer), anchor="end"))
        for column, share in enumerate(report.share_LX[row]):
            parts.append(
                f'<rect x="{x + _LEFT + column * cell:.2f}" y="{y}" width="{cell:.2f}" height="{_ROW - 1}" '
                f'fill="{_colour(float(share))}"><title>layer {layer}, {what} {column}: {share:.3f}</title></rect>'
            )
        parts.append(text(right + _RIGHT, y + 12, f"{report.imbalance_L[row]:.3f}", anchor="end"))
    y = _TOP + len(report.layers) * _ROW + 12
    average = f"{report.imbalance_L.mean():.3f}"
    return [*parts, text(x + _LEFT - 6, y, "avg", anchor="end"), text(right + _RIGHT, y, average, anchor="end")]


def _legend(x: float, y: float) -> list[str]:
    parts = [text(x, y - 4, "tokens / mean")]
    for i, share in enumerate((0.0, 0.4, 0.7, 0.9, 1.0, 1.1, 1.3, 2.0, 4.0)):
        at = x + 90 + i * 40
        parts.append(f'<rect x="{at}" y="{y - 14}" width="14" height="14" fill="{_colour(share)}" stroke="#999"/>')
        parts.append(text(at + 18, y - 3, f"{share:g}"))
    return parts


def text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "start") -> str:
    """An element that writes words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def _colour(share: float) -> str:
    """Blue below the mean, white at it, red above; four times the mean and more are the darkest red."""
    share = min(share, _SCALE[-1][0])
    for (low, first), (high, last) in zip(_SCALE, _SCALE[1:], strict=False):
        if share <= high:
            part = (share - low) / (high - low)
            return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(first, last, strict=True))
    raise AssertionError(share)
