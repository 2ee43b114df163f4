"""What `nonet eplb simulate` and `advise` share: the options that say which load and which ranks, and what they mean.

Imports the rest of nonet when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nonet.errors import ConfigError

if TYPE_CHECKING:
    from nonet.config.fleet import Fleet
    from nonet.eplb.workload import Workload

Statistic = Annotated[
    Path | None,
    typer.Option(
        "--expert_statistic_path",
        help="Folder that a run recorded, or a file with logical_count (.npy, .npz, .safetensors, .pt).",
    ),
]
Load = Annotated[
    str | None,
    typer.Option(
        "--load",
        help="A made-up load in place of a recorded one: uniform, zipf, lognormal, dirichlet, hot4, pareto, r1like or "
        "calibrated, with a number after a colon, as in zipf:1.2.",
    ),
]
EpSizes = Annotated[list[str] | None, typer.Option("--ep_size", help="Ranks; several with commas. Default: recorded.")]
TokensPerRank = Annotated[
    int | None,
    typer.Option(
        "--tokens_per_rank",
        min=1,
        help="(token, expert) pairs a rank, layer and step. Made-up loads: 1024. Recorded ones are replayed as they "
        "are, and with this drawn anew from their shares.",
    ),
]
NumLayers = Annotated[int, typer.Option("--num_layers", min=1, help="MoE layers of a made-up load.")]
NumExperts = Annotated[int, typer.Option("--num_experts", min=1, help="Experts of a made-up load.")]
Moves = Annotated[
    str, typer.Option("--moves", help="How a made-up load moves: steady, drift, topics-weak or topics-strong.")
]
Drift = Annotated[float, typer.Option("--sd", help="Standard deviation of a drifting expert's log-share.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the ranks stand on, equally many each.")]
Seed = Annotated[int, typer.Option("--seed", help="Of made-up loads, and of where recorded tokens come from.")]
Format = Annotated[str, typer.Option("--format", help="table, or json with all figures.")]


def workload_of(
    path: Path | None, load: str | None, num_steps: int, tokens_per_rank: int | None, num_layers: int,
    num_experts: int, moves: str, sd: float, seed: int,
) -> Workload:  # fmt: skip
    from nonet.cli.eplb_files import load_statistics
    from nonet.eplb.workload import TOKENS_PER_RANK, MadeUp, Recorded

    if (path is None) == (load is None):
        value = None if path is None else str(path)
        raise ConfigError("--expert_statistic_path", value, "give this or --load NAME, one of the two")
    if path is not None:
        return Recorded(load_statistics(path), tokens_per_rank, seed)
    assert load is not None
    return MadeUp(load, num_steps, num_layers, num_experts, tokens_per_rank or TOKENS_PER_RANK, moves, sd, seed)


def recorded_ranks(work: Workload) -> int:
    from nonet.eplb.workload import Recorded

    return work.statistics.num_ranks if isinstance(work, Recorded) else 32


def fleet_of(ranks: int, slots: int, experts: int, nodes: int) -> Fleet:
    """Raises ConfigError where slots do not suffice or ranks do not divide over nodes."""
    from nonet.config.fleet import Fleet

    if slots < max(experts, ranks):
        raise ConfigError(
            "--num_slots", slots, f"{experts} experts on {ranks} ranks need {max(experts, ranks)} or more"
        )
    if ranks % nodes:
        raise ConfigError("--nodes", nodes, f"{ranks} ranks do not divide over them")
    even = Fleet.even(ranks, slots)
    return Fleet(even.slots_by_rank, tuple(rank * nodes // ranks for rank in range(ranks)) if nodes > 1 else ())


def words(given: Sequence[str] | None, default: str) -> list[str]:
    return [word.strip() for text in given or [default] for word in text.split(",")]


def numbers(field: str, given: Sequence[str] | None, default: list[int]) -> list[int]:
    """Counts of at least 1. Raises ConfigError."""
    if not given:
        return default
    found = words(given, "")
    wrong = next((word for word in found if not (word.isascii() and word.isdigit() and int(word))), None)
    if wrong is not None:
        raise ConfigError(field, wrong, "give counts of 1 or more, several with commas")
    return [int(word) for word in found]


def check_format(shape: str) -> None:
    if shape not in ("table", "json"):
        raise ConfigError("--format", shape, "use table or json")


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, to the right but for words."""
    lines = [list(names), *map(list, rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(names))]
    left = [rows and not any(c.isdigit() for c in rows[0][i][:1]) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if at_left else cell.rjust(w) for cell, w, at_left in zip(line, width, left, strict=True)
        )
        for line in lines
    )


def check_svg(plot: Path | None) -> None:
    """Raises ConfigError."""
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError("--plot", str(plot), "only SVG is drawn; use a name that ends in .svg")
