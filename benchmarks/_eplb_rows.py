"""A goal of the expert load balancer and what was measured: one line of the table that `eplb.py` prints."""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 1.5  # what is required: the goal times this


@dataclass(frozen=True)
class Row:
    """`measured` is to be at most `goal`; without a goal it is shown beside the others, for comparison."""

    group: str
    what: str
    measured: float
    goal: float | None = None
    required: float | None = None  # default: SLACK times the goal
    unit: str = ""

    @property
    def limit(self) -> float | None:
        if self.goal is None:
            return None
        return SLACK * self.goal if self.required is None else self.required

    @property
    def verdict(self) -> str:
        if self.goal is None or self.limit is None:
            return ""
        return "goal" if self.measured <= self.goal else "required" if self.measured <= self.limit else "MISSED"

    def cells(self) -> list[str]:
        def shown(value: float | None) -> str:
            if value is None:
                return ""
            return f"{value:.5f}".rstrip("0").rstrip(".") if 1e-4 <= abs(value) < 1 else f"{value:.4g}"

        return [
            self.group,
            self.what,
            shown(self.limit),
            shown(self.goal),
            shown(self.measured),
            self.unit,
            self.verdict,
        ]


HEADER = ["goal", "what", "required", "goal", "measured", "unit", "verdict"]


def text(rows: list[Row]) -> str:
    lines = [HEADER, *(row.cells() for row in rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    left = {0, 1, 5, 6}
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        for line in lines
    )
