"""`nonet eplb advise`: how many slots a wanted balance takes, with its proof and its price in memory.

A plain function with annotated options; `eplb` registers it. It imports the rest of nonet when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    fleet_of,
    numbers,
    recorded_ranks,
    table,
    workload_of,
)  # fmt: skip

if TYPE_CHECKING:
    from nonet.config.fleet import Fleet
    from nonet.eplb.advise import Advice


def advise(
    imbalance: Annotated[float, typer.Option("--imbalance", help="Wanted: (max - mean) / mean, mean over layers.")],
    expert_statistic_path: Statistic = None,
    load: Load = None,
    ep_size: EpSizes = None,
    policy: Annotated[str, typer.Option("--policy", help="A file in nonet/eplb/policies.")] = "nonet",
    dispatch: Annotated[str, typer.Option("--dispatch", help="even or waterfill.")] = "even",
    most_slots: Annotated[
        int | None, typer.Option("--most_slots", min=1, help="Give up there. Default: 4 times what experts need.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Folder of a checkpoint, for the memory.")] = None,
    bytes_per_expert: Annotated[
        int | None, typer.Option("--bytes_per_expert", min=1, help="In place of --model (DeepSeek-V3: 44040192).")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=0, help="Steps of statistics that are kept.")] = 1000,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a made-up load.")] = 40,
    tokens_per_rank: TokensPerRank = None,
    num_layers: NumLayers = 58,
    num_experts: NumExperts = 256,
    moves: Moves = "drift",
    sd: Drift = 0.10,
    nodes: Nodes = 1,
    seed: Seed = 0,
    shape: Format = "table",
) -> None:
    """The least slots for a wanted imbalance, the proof, and what they cost in memory.

    The answer S is planned, and so is S - 1. planned is of the load of all steps added up; replayed is the mean over
    steps, planned on the first half of them and seen on the second, which sampling noise and drift keep above it.
    """
    from nonet.eplb.advise import advise as ask
    from nonet.eplb.memory import Memory
    from nonet.eplb.memory import bytes_per_expert as read_bytes

    check_format(shape)
    ranks_given = numbers("--ep_size", ep_size, [])
    work = workload_of(expert_statistic_path, load, steps, tokens_per_rank, num_layers, num_experts, moves, sd, seed)
    found = []
    each = bytes_per_expert or (read_bytes(model) if model else None)
    for ranks in ranks_given or [recorded_ranks(work)]:
        load_NLE, load_NRLE = work.steps(ranks)

        def fleet(slots: int, ranks: int = ranks) -> Fleet:
            return fleet_of(ranks, slots, work.num_experts, nodes)

        least = ask(
            load_NLE.mean(axis=0), fleet, ranks, imbalance, dispatch=dispatch, policy=policy, most_slots=most_slots
        )
        row = _advice(least, load_NLE, load_NRLE, policy, dispatch, work.layers) | {"ranks": ranks}
        if each is not None:
            most = int(least.whole.plan.placement.replicas(0)[1].max())
            cost = Memory.of(len(work.layers), work.num_experts, least.whole.slots, ranks, each, most, window)
            row["memory_bytes_a_rank"] = vars(cost)
            row["memory_lines"] = cost.lines()
        found.append(row)
    if shape == "json":
        typer.echo(json.dumps(found, indent=1))
        return
    for row in found:
        _tell(row)


def _advice(
    found: Advice, load_NLE: Any, load_NRLE: Any, policy: str, dispatch: str, layers: Sequence[int]
) -> dict[str, Any]:
    """Plain figures of an advice, with its plans replayed where there are steps for it."""
    from nonet.eplb.simulate import Options
    from nonet.eplb.simulate import simulate as replay

    half = len(load_NLE) // 2
    attempts = {"S - 1": found.below, "S": found.least, "even": found.whole}
    lines = []
    for name, tried in attempts.items():
        if tried is None:
            continue
        replayed = None
        if half:
            options = Options(policy, dispatch, plan_steps=half)
            seen = replay(load_NLE, tried.plan.placement.fleet, options, load_NRLE=load_NRLE)
            replayed = seen.summary()["imbalance_mean"]
        lines.append(
            {"what": name, "slots": tried.slots, "redundant": tried.slots - tried.plan.placement.num_experts,
             "planned": tried.imbalance, "bound": tried.bound, "reaches": tried.reaches(found.target),
             "replayed": replayed}
        )  # fmt: skip
    return {
        "target": found.target, "dispatch": dispatch, "slots": found.least.slots, "even_slots": found.whole.slots,
        "plans": lines, "proven": found.proven, "threshold": found.threshold,
        "layer_slots": dict(zip(map(str, layers), map(int, found.layer_slots_L), strict=True)),
    }  # fmt: skip


def _tell(row: dict[str, Any]) -> None:
    from collections import Counter

    ranks, slots, even = row["ranks"], row["slots"], row["even_slots"]
    typer.echo(
        f"imbalance {row['target']:g} with dispatch {row['dispatch']} on {ranks} ranks takes {slots} slots; with "
        f"as many on each rank {even}, {even // ranks} a rank"
    )
    cells = [
        [line["what"], str(line["slots"]), str(line["redundant"]), f"{line['planned']:.4f}", f"{line['bound']:.4f}",
         "yes" if line["reaches"] else "no", "-" if line["replayed"] is None else f"{line['replayed']:.4f}"]
        for line in row["plans"]
    ]  # fmt: skip
    typer.echo(table(["", "slots", "redundant", "planned", "bound", "reached", "replayed"], cells))
    if row["proven"]:
        typer.echo("proven: no placement with one slot less reaches it")
    else:
        typer.echo("with one slot less this planner finds no placement; its bound does not exclude one")
    many = Counter(row["layer_slots"].values())
    share = ", ".join(f"{count} with {n}" for n, count in sorted(many.items()) if n)
    typer.echo(f"layers by themselves, of the counts that were tried with as many slots on each rank: {share}")
    threshold, enough = row["threshold"], "reached" if slots >= row["threshold"] else "not reached"
    typer.echo(f"from {threshold} slots on (experts + ranks - 1) water-filling can level every step: {enough}")
    if "memory_lines" in row:
        typer.echo(f"memory on a rank with {even} slots:")
        typer.echo("\n".join(f"  {line}" for line in row["memory_lines"]))
