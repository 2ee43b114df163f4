"""`nonet eplb`: judge recorded statistics, plan a placement from them, and try out others before buying.

Flags have TensorRT-LLM's names; "-" and "_" are the same in them. Commands import what they need when they run.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nonet.cli import eplb_advise, eplb_simulate
from nonet.cli.eplb_options import check_svg
from nonet.errors import ConfigError

if TYPE_CHECKING:
    from nonet.config.fleet import Fleet
    from nonet.eplb.load import Floats
    from nonet.eplb.plan import Plan
    from nonet.eplb.recorded import Statistics

app = typer.Typer(
    name="eplb",
    help="Expert load balancing: report on recorded statistics, plan placements, simulate, advise.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda token: token.replace("-", "_")},
)


class Format(StrEnum):
    table = "table"
    json = "json"


IterStart = Annotated[int | None, typer.Option("--iter_start", help="First iteration to use. Default: the first.")]
IterStop = Annotated[int | None, typer.Option("--iter_stop", help="Iteration to stop before. Default: all.")]
Shape = Annotated[Format, typer.Option("--format", help="A table for people, or JSON with all figures.")]
SlotMap = Annotated[
    Path | None,
    typer.Option(
        "--slot_map", help="YAML that the recorded run was served with, if TensorRT-LLM recorded it with a balancer."
    ),
]
_FILES = "Folder that a run recorded, or a file with logical_count (.npy, .npz, .safetensors, .pt)."


@app.command(short_help="How unevenly tokens fell on ranks, by layer.")
def report(
    expert_statistic_path: Annotated[list[Path], typer.Option("--expert_statistic_path", help=f"{_FILES} Repeatable.")],
    iter_start: IterStart = None,
    iter_stop: IterStop = None,
    per_expert: Annotated[bool, typer.Option("--per_expert", help="Compare slots instead of ranks.")] = False,
    ep_size: Annotated[
        int | None, typer.Option("--ep_size", min=2, help="As if slots lay in order on so many ranks.")
    ] = None,
    slot_map: SlotMap = None,
    shape: Shape = Format.table,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the load of ranks to this SVG file.")] = None,
) -> None:
    """Print mean, standard deviation and imbalance ratio of the tokens that ranks got, by layer.

    Each is taken in every iteration and then averaged. The imbalance ratio is (max - mean) / mean.
    """
    from nonet.cli.eplb_files import load_statistics, write_text
    from nonet.eplb.balancer_file import read_assignments
    from nonet.eplb.picture import draw
    from nonet.eplb.report import report as report_on

    rows = read_assignments(slot_map, "--slot_map") if slot_map else None
    check_svg(plot)
    found = []
    for path in expert_statistic_path:
        statistics = load_statistics(path, iter_start, iter_stop, slot_map=rows)
        statistics = statistics.spread_over(ep_size) if ep_size else statistics
        load = statistics.slot_load() if per_expert else statistics.rank_load()
        found.append((path, statistics, report_on(load, statistics.layers, statistics.first_iteration)))
        if not (statistics.spread or per_expert or ep_size):
            ranks = load.shape[-1]
            typer.echo(f"note: {path}: experts were not spread over ranks; shown as if over {ranks}", err=True)
    if plot is not None:
        write_text(plot, draw([(str(p), r) for p, _, r in found], "slot" if per_expert else "rank"), "--plot")
    if shape is Format.json:
        many = [{"expert_statistic_path": str(path), **r.as_dict()} for path, _, r in found]
        typer.echo(json.dumps(many[0] if len(many) == 1 else many, indent=1))
        return
    for path, _, r in found:
        typer.echo(f"{path}: {r.text()}" if len(found) > 1 else r.text())


@app.command(short_help="From statistics to a placement, as the YAML that is served.")
def plan(
    expert_statistic_path: Annotated[Path, typer.Option("--expert_statistic_path", help=_FILES)],
    output_path: Annotated[Path, typer.Option("--output_path", help="YAML file to write.")],
    ep_size: Annotated[int | None, typer.Option("--ep_size", min=1, help="Ranks. Default: the recorded run's.")] = None,
    num_slots: Annotated[
        int | None, typer.Option("--num_slots", min=1, help="Slots over all ranks. Default: the recorded run's.")
    ] = None,
    slots_per_rank: Annotated[
        int | None, typer.Option("--slots_per_rank", min=1, help="The same by rank, in place of --num_slots.")
    ] = None,
    iter_start: IterStart = None,
    iter_stop: IterStop = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the ranks stand on, equally many each.")] = 1,
    num_groups: Annotated[
        int | None,
        typer.Option("--num_groups", min=1, help="Groups of experts that the router picks few of, to keep on a node."),
    ] = None,
    policy: Annotated[str, typer.Option("--policy", help="A file in nonet/eplb/policies; default is nonet.")] = "nonet",
    dispatch: Annotated[
        str, typer.Option("--dispatch", help="How tokens will be shared among replicas: even or waterfill.")
    ] = "even",
    current: Annotated[
        Path | None, typer.Option("--current", help="YAML of the placement that is there: plan from it.")
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max_moves", min=0, help="Most experts a layer that ranks have to load.")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples/--sum", help="Plan for single iterations, or for all of them added up.")
    ] = True,
    layer_updates_per_iter: Annotated[
        int, typer.Option("--layer_updates_per_iter", min=0, help="Written to the YAML. 0: a static placement.")
    ] = 0,
    slot_map: SlotMap = None,
    shape: Shape = Format.table,
) -> None:
    """Plan which expert each slot holds, write it as TensorRT-LLM's YAML, and say what to expect of it.

    `planned` is the imbalance of the load of all iterations added up, `bound` a proven lower bound of it, `gap` the
    difference. `predicted` is what `nonet eplb report` would have shown in these iterations under the new placement,
    `recorded` what it did show.
    """
    from nonet.cli.eplb_files import load_statistics, write_text
    from nonet.eplb.balancer_file import read_assignments, render
    from nonet.eplb.placement import Placement
    from nonet.eplb.plan import plan as plan_for

    rows = read_assignments(slot_map, "--slot_map") if slot_map else None
    statistics = load_statistics(expert_statistic_path, iter_start, iter_stop, slot_map=rows)
    fleet = _fleet(statistics, ep_size, num_slots, slots_per_rank, nodes)
    before = None
    if current is not None:
        given = read_assignments(current, "--current")
        experts, slots = statistics.num_experts, fleet.num_slots
        before = Placement.from_assignments(given, statistics.layers, experts, slots, fleet.num_ranks)
    load = statistics.load()
    if not samples:
        load = load.sum(axis=0)
    found = plan_for(
        load, fleet, policy=policy, dispatch=dispatch, current=before, max_moves=max_moves, num_groups=num_groups
    )
    lines = _summary(found, statistics)
    text = render(found.placement, statistics.layers, layer_updates_per_iter, lines)
    write_text(output_path, text, "--output_path")
    _show(found, statistics, lines, output_path, shape, has_current=before is not None)


def _fleet(
    statistics: Statistics, ep_size: int | None, num_slots: int | None, slots_per_rank: int | None, nodes: int
) -> Fleet:
    """The ranks to plan for. Raises ConfigError where slots do not fit on them."""
    from nonet.cli.eplb_options import fleet_of

    was, experts = statistics.placement.fleet, statistics.num_experts
    ranks = ep_size or was.num_ranks
    if slots_per_rank is not None:
        if num_slots not in (None, ranks * slots_per_rank):
            remedy = (
                f"--slots_per_rank {slots_per_rank} on {ranks} ranks is {ranks * slots_per_rank}; give one of the two"
            )
            raise ConfigError("--num_slots", num_slots, remedy)
        num_slots = ranks * slots_per_rank
    slots = num_slots or was.num_slots
    most = -(-experts // ranks) * ranks  # the least that divides and has room for every expert
    if slots < experts:
        raise ConfigError(
            "--num_slots", slots, f"there are {experts} experts, and each needs a slot; use {most} or more"
        )
    if slots % ranks and slots != experts:
        near = [n for n in (slots - slots % ranks, slots - slots % ranks + ranks) if n >= experts]
        remedy = "does not divide, and successive slots share a rank; nearest: " + " or ".join(map(str, near))
        raise ConfigError("--num_slots", slots, f"over {ranks} ranks it {remedy}")
    if slots < ranks:
        raise ConfigError("--ep_size", ranks, f"each rank needs a slot; use at most {slots}")
    return fleet_of(ranks, slots, experts, nodes)


def _summary(found: Plan, statistics: Statistics) -> list[str]:
    """What was planned from what: the first lines of the file and of what is printed."""
    fleet, first = found.placement.fleet, statistics.first_iteration
    lines = [
        f"nonet eplb plan: policy {found.policy}, dispatch {found.dispatch}, {found.placement.num_experts} experts in "
        f"{fleet.num_slots} slots on {fleet.num_ranks} ranks, from iterations {first} to "
        f"{first + statistics.num_iterations - 1}",
        f"imbalance of the whole load, mean of layers: {found.imbalance_L.mean():.4f}, "
        f"proven lower bound {found.bound_L.mean():.4f}",
    ]
    if found.dispatch != "even":
        lines.append(f"serve it with replica_dispatch: {found.dispatch}")
    return lines


def _predicted(found: Plan, statistics: Statistics) -> Floats:
    """[L] what the report would show of the recorded iterations under the plan and its dispatch rule."""
    from nonet.eplb.report import report as report_on
    from nonet.eplb.simulate import Options, simulate

    if found.dispatch == "even":
        return report_on(statistics.replay(found.placement).rank_load(), statistics.layers).imbalance_L
    fleet, options = found.placement.fleet, Options(dispatch=found.dispatch)
    return simulate(statistics.load(), fleet, options, placement=found.placement).imbalance_NL.mean(axis=0)


def _show(
    found: Plan, statistics: Statistics, lines: list[str], path: Path, shape: Format, *, has_current: bool
) -> None:
    from nonet.eplb.report import report as report_on
    from nonet.eplb.report import table

    columns: dict[str, Floats] = {}
    ranks = found.placement.fleet.num_ranks
    if statistics.placement.fleet.num_ranks > 1:
        columns["recorded"] = report_on(statistics.rank_load(), statistics.layers).imbalance_L
    if ranks > 1:
        columns["predicted"] = _predicted(found, statistics)
    columns |= {"planned": found.imbalance_L, "bound": found.bound_L, "gap": found.gap_L}
    if has_current:
        columns["moves"] = found.moves_L.astype(float)
    if shape is Format.json:
        layers = {
            str(layer): {name: float(values[i]) for name, values in columns.items()}
            for i, layer in enumerate(statistics.layers)
        }
        average = {name: float(values.mean()) for name, values in columns.items()}
        typer.echo(json.dumps({"output_path": str(path), "layers": layers, "average": average}, indent=1))
        return
    typer.echo("\n".join([*lines, table(statistics.layers, columns), f"written to {path}"]))


app.command(short_help="Replay a load on other fleets, policies and dispatch rules.")(eplb_simulate.simulate)
app.command(short_help="The least slots for a wanted balance, and what memory they cost.")(eplb_advise.advise)
