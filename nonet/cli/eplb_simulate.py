"""`nonet eplb simulate`: what balance a fleet would have had. And `advise`, from its own file, for who registers both.

Plain functions with annotated options; `eplb` registers them. They import the rest of nonet when they run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nonet.cli.eplb_advise import advise
from nonet.cli.eplb_options import (
    Drift,
    EpSizes,
    Format,
    Load,
    Moves,
    Nodes,
    NumExperts,
    NumLayers,
    Seed,
    Statistic,
    TokensPerRank,
    check_format,
    check_svg,
    fleet_of,
    numbers,
    recorded_ranks,
    table,
    words,
    workload_of,
)  # fmt: skip

if TYPE_CHECKING:
    from nonet.eplb.placement import Placement
    from nonet.eplb.workload import Workload

__all__ = ["advise", "simulate"]

PLAN_STEPS = 128


def simulate(
    expert_statistic_path: Statistic = None,
    load: Load = None,
    ep_size: EpSizes = None,
    num_slots: Annotated[
        list[str] | None,
        typer.Option("--num_slots", help="Slots over all ranks; several with commas. Default: one a rank to spare."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Files in nonet/eplb/policies, or none; several with commas. Default: nonet."),
    ] = None,
    dispatch: Annotated[
        list[str] | None,
        typer.Option(
            "--dispatch",
            help="even, waterfill (counts of this step), waterfill-average (running average), optimal (fractions), "
            "hashed (vLLM's rule); several with commas. Default: even.",
        ),
    ] = None,
    placement: Annotated[
        Path | None, typer.Option("--placement", help="YAML of a placement, in place of slots and policies.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a made-up load to replay.")] = 40,
    plan_steps: Annotated[
        int | None,
        typer.Option(
            "--plan_steps",
            min=0,
            help="First steps, to plan on and not to replay; 0: plan on all and replay all. Default: 128 of a made-up "
            "load, half of a recorded one; 0 with --placement.",
        ),
    ] = None,
    rebalance_every: Annotated[
        int, typer.Option("--rebalance_every", min=0, help="Plan again after so many steps; 0: never.")
    ] = 0,
    max_moves: Annotated[
        int | None, typer.Option("--max_moves", min=0, help="Most experts a layer to load in a later plan.")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples/--sum", help="Plan for single steps, or for all of them added up (faster).")
    ] = True,
    tokens_per_rank: TokensPerRank = None,
    num_layers: NumLayers = 58,
    num_experts: NumExperts = 256,
    moves: Moves = "drift",
    sd: Drift = 0.10,
    nodes: Nodes = 1,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the imbalances to this SVG file.")] = None,
    shape: Format = "table",
) -> None:
    """Replay a load in whole tokens, step by step, on fleets, policies and dispatch rules of your choice.

    imbalance is (max - mean) / mean of the tokens that ranks get, by step and layer; balancedness is mean / max.
    planned and bound are of the load that was planned on: what the plan would reach, and what none can be below.
    """
    from nonet.cli.eplb_files import write_text
    from nonet.eplb.chart import draw_bars
    from nonet.eplb.simulate import Options
    from nonet.eplb.simulate import simulate as replay

    check_format(shape)
    check_svg(plot)
    begin = time.monotonic()
    lead = PLAN_STEPS if plan_steps is None and placement is None else plan_steps or 0
    work = workload_of(
        expert_statistic_path, load, lead + steps, tokens_per_rank, num_layers, num_experts, moves, sd, seed
    )
    rows: list[dict[str, Any]] = []
    for ranks in numbers("--ep_size", ep_size, [recorded_ranks(work)]):
        load_NLE, load_NRLE = work.steps(ranks)
        first = len(load_NLE) // 2 if expert_statistic_path and plan_steps is None and placement is None else lead
        spare = (-(-work.num_experts // ranks) + 1) * ranks
        if placement is not None:
            given = _placement(placement, work, ranks, nodes)
            cases = [(given.fleet, str(placement))]
        else:
            given = None
            slots = numbers("--num_slots", num_slots, [spare])
            cases = [
                (fleet_of(ranks, n, work.num_experts, nodes), name) for n in slots for name in words(policy, "nonet")
            ]
        for fleet, name in cases:
            for rule in words(dispatch, "even"):
                options = Options(name, rule, first, rebalance_every, max_moves, samples, seed=seed)
                found = replay(load_NLE, fleet, options, load_NRLE=load_NRLE, placement=given)
                rows.append(found.summary() | {"worst_layer": work.layers[found.summary()["worst_layer"]]})
    if plot is not None:
        write_text(plot, draw_bars(rows), "--plot")
    _show(rows, shape, time.monotonic() - begin)


def _show(rows: Sequence[dict[str, Any]], shape: str, seconds: float) -> None:
    if shape == "json":
        typer.echo(json.dumps({"simulations": rows, "seconds": seconds, "peak_mib": _peak_mib()}, indent=1))
        return
    columns = {
        "ranks": "{ranks}", "slots": "{slots}", "policy": "{policy}", "dispatch": "{dispatch}",
        "imbalance": "{imbalance_mean:.4f}", "p95": "{imbalance_p95:.4f}",
        "worst layer": "{imbalance_worst_layer:.4f} ({worst_layer})", "balancedness": "{balancedness:.4f}",
        "planned": "{planned:.4f}", "bound": "{bound:.4f}", "moves": "{moves_a_layer_and_plan:.1f}",
        "planner ms": "{planner_ms:.0f}",
    }  # fmt: skip
    typer.echo(table(list(columns), [[form.format(**row) for form in columns.values()] for row in rows]))
    steps = rows[0]["steps"]
    typer.echo(f"{steps} steps each; moves: experts to load, a layer and plan; {seconds:.1f} s, {_peak_mib():.0f} MiB")


def _placement(path: Path, work: Workload, ranks: int, nodes: int) -> Placement:
    from nonet.eplb.balancer_file import read_assignments
    from nonet.eplb.placement import Placement

    rows = read_assignments(path, "--placement")
    slots = len(next(iter(rows.values()), ()))
    fleet = fleet_of(ranks, slots, work.num_experts, nodes)
    made = Placement.from_assignments(rows, work.layers, work.num_experts, slots, ranks)
    return Placement(made.expert_LG, fleet, made.num_experts)


def _peak_mib() -> float:
    """Most memory that this process has held."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10
