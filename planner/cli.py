"""The command line: reads arguments, calls the planner, prints. Only commands import torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from evoplan.planner.flags import AUTO, Number, check_skip_bad, problem_of, problem_options
from evoplan.planner.terminal import CHECK_FAILED, check_writable, console_for_output, progress, run_command

if TYPE_CHECKING:
    from evoplan.planner.timing import Times

ROOFLINE_WIDTH = 150


_CACHE = click.option("--cache", type=click.Path(), help="File of measured times; else EVOPLAN_CACHE.")
_TIMES = click.option(
    "--times",
    type=click.Choice(["auto", "measured", "calibrated", "roofline"]),
    default="auto",
    show_default=True,
    help="Where step times come from; auto: the best there is.",
)
_JSON = click.option("--json", "json_path", type=click.Path(), help="Also write the result as JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="evoplan")
def cli() -> None:
    """Plan, run and verify Evoformer stacks within a memory budget."""


@cli.command()
@problem_options
@click.option(
    "--solver", "solver_name", default="dp", show_default=True,
    help="dp, cp-sat, none, small, large, sqrt or seed-dp.",
)  # fmt: skip
@click.option("--certify", is_flag=True, help="Also prove how far from optimal the plan may be.")
@_TIMES
@_CACHE
@click.option("--out", type=click.Path(), help="Write the plan here.")
@_JSON
def plan(
    solver_name: str,
    certify: bool,
    times: Times,
    cache: str | None,
    out: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """Find the fastest schedule that fits; print it and what it saves."""
    check_writable(out, json_path)
    auto = flags["ranks"] == AUTO
    problem = problem_of(**flags | {"ranks": 1} if auto else flags)
    from evoplan.planner.plan import write_json
    from evoplan.planner.planning import NoPlanError, cost_and_solve, solve_for_fewest_ranks
    from evoplan.planner.report import print_plan
    from evoplan.planner.solvers import solver

    solver(solver_name)  # a wrong name is said before the work
    try:
        with progress("loading torch") as update:
            if auto:
                costed, found = solve_for_fewest_ranks(problem, solver_name, update, times, cache)
            else:
                costed, found = cost_and_solve(problem, solver_name, times, cache, update)
            if certify:
                from evoplan.planner.certify import certify as with_certificates

                found = with_certificates(costed, found, update)
    except NoPlanError as error:
        if json_path:
            least = {"least_feasible_bytes": error.least_feasible_bytes, "budget_bytes": problem.budget_bytes}
            write_json(json_path, least)
        raise
    print_plan(found, console_for_output())
    for path in filter(None, (out, json_path)):
        found.save(path)
    if out:
        click.echo(f"plan written to {out}")


@cli.command()
@problem_options
@click.option("--every", is_flag=True, help="Print every strategy, not only whole.")
@_JSON
def roofline(every: bool, json_path: str | None, **flags: Any) -> None:
    """What bounds each submodule on a device: FLOPs, bytes, kernels, intensity, lower and upper times."""
    check_writable(json_path)
    problem = problem_of(**flags)
    from evoplan.planner.costing import cost_problem
    from evoplan.planner.plan import write_json
    from evoplan.planner.roofline import print_roofline, roofline, roofline_to_json

    with progress("tracing") as update:
        costed = cost_problem(problem, progress=lambda name: update(f"tracing {name}"))
    rows = roofline(costed)
    # A discarding run of whole does what its forward does, where it has one.
    left_out = "discard" if problem.training else None
    shown = [row for row in rows if every or (str(row.strategy) == "whole" and row.phase != left_out)]
    print_roofline(shown, costed, console_for_output(ROOFLINE_WIDTH))
    if json_path:
        write_json(json_path, roofline_to_json(rows, costed))


@cli.command()
@problem_options
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs; medians count."
)
@click.option("--max-pieces", type=click.IntRange(1), help="Leave out strategies of more pieces.")
@click.option("--again", is_flag=True, help="Also measure what the cache has.")
@click.option("--compile", "compiled", is_flag=True, help="Also try torch.compile on each submodule.")
@_CACHE
@click.option("--save-device", type=click.Path(), help="Write the calibrated device as a device file.")
@_JSON
def profile(
    repeats: int,
    max_pieces: int | None,
    again: bool,
    compiled: bool,
    cache: str | None,
    save_device: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """Measure the times of every step under every strategy here, for `plan --times`."""
    check_writable(save_device, json_path)
    problem = problem_of(**flags)
    from evoplan.planner.plan import write_json
    from evoplan.planner.profiling import profile_problem
    from evoplan.planner.report_times import print_profile, profile_to_json

    with progress("loading torch") as update:
        measured, calibration, calibrated = profile_problem(
            problem, cache, repeats, max_pieces, again, compiled, update
        )
    print_profile(measured, calibration, console_for_output())
    if save_device:
        from evoplan.planner.device_file import device_entry

        write_json(save_device, device_entry(calibrated))
        click.echo(f"calibrated device written to {save_device}")
    if json_path:
        write_json(json_path, profile_to_json(problem, measured, calibration))


@cli.command()
@click.argument("plan_file", type=click.Path())
@_CACHE
@_JSON
def show(plan_file: str, cache: str | None, json_path: str | None) -> None:
    """Print a plan: its schedule, its memory over time, where the peak is and why, and the alternatives.

    Times are of the kind that the plan was made with, as far as this machine has them.
    """
    check_writable(json_path)
    from evoplan.planner.alternatives import alternatives, alternatives_to_json, print_alternatives
    from evoplan.planner.plan import load_plan, write_json
    from evoplan.planner.replay import replay
    from evoplan.planner.report import print_plan, print_schedule, print_timeline, step_names
    from evoplan.planner.timing import MissingTimesError, cost_of_plan

    found, console = load_plan(plan_file), console_for_output()
    print_plan(found, console)
    console.print()
    print_schedule(found, console)
    console.print()
    try:
        with progress("tracing") as update:
            costed, times_lost = cost_of_plan(found, cache, update)
            update("comparing")
            others = alternatives(found, costed)
    except MissingTimesError as error:
        console.print(f"no memory over time, and no alternatives: {error}", highlight=False)
        if json_path:
            write_json(json_path, {"plan": found.to_json()})
        return
    result = replay(found.sequence(), costed.table)
    print_timeline(result, costed.fixed_bytes, step_names(found.problem), console)
    console.print()
    if times_lost:
        console.print(f"{times_lost}: times below are of the {costed.times.name}", highlight=False)
    print_alternatives(others, console)
    if json_path:
        moments = [
            {**vars(moment), "held_bytes": costed.fixed_bytes + moment.held_bytes,
             "peak_bytes": costed.fixed_bytes + moment.peak_bytes}
            for moment in result.moments
        ]  # fmt: skip
        document = {"plan": found.to_json(), "timeline": moments, "times": costed.times.name}
        write_json(json_path, document | {"alternatives": alternatives_to_json(others)})


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option(
    "--simulate", is_flag=True, help="Memory only, on fake tensors: for what this machine cannot hold."
)
@click.option("--blocks", type=click.IntRange(1), help="Only the first K blocks of the stack.")
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs; medians count."
)
@_JSON
def verify(plan_file: str, simulate: bool, blocks: int | None, repeats: int, json_path: str | None) -> None:
    """Apply a plan, measure it here, and compare it with the model without a plan.

    A plan for several ranks: torchrun --nproc_per_node=N -m evoplan.planner verify ...
    """
    from evoplan.planner.world import joined

    with joined(timeout=60) as world:
        check_writable(json_path)
        from evoplan.planner.plan import load_plan, write_json
        from evoplan.planner.planning import shorten_plan
        from evoplan.planner.report import describe_problem, print_rank_verifications, print_verification
        from evoplan.planner.verify import simulate_plan, verify_on, verify_plan

        found = load_plan(plan_file)
        with progress("preparing") as update:
            if blocks is not None and blocks < found.problem.config.n_block:
                found = shorten_plan(found, blocks, progress=update)
            elif blocks is not None and blocks > found.problem.config.n_block:
                raise ValueError(f"--blocks {blocks}: the plan has {found.problem.config.n_block} blocks")
            update("simulating" if simulate else "running")
            if simulate:
                results = [simulate_plan(found, rank) for rank in range(found.problem.ranks)]
            elif found.problem.ranks * world.size == 1:
                results = [verify_plan(None, found, repeats, progress=update)]
            else:
                results = verify_on(world, found, repeats, f"verify {plan_file}", update)
        if world.first:
            console = console_for_output()
            console.print(describe_problem(found.problem), highlight=False)
            print_verification(results[0], console)
            print_rank_verifications(results, console)
            if json_path:
                ranks = [{"rank": rank, **result.to_json()} for rank, result in enumerate(results)]
                write_json(json_path, results[0].to_json() | ({"ranks": ranks} if len(ranks) > 1 else {}))
    sys.exit(0 if all(result.ok for result in results) else CHECK_FAILED)


@cli.command()
@problem_options
@_TIMES
@_CACHE
@click.option("--points", type=click.IntRange(2, 2000), default=60, show_default=True, help="Budgets.")
@click.option("--out", type=click.Path(), help="Write the frontier as JSON here.")
@click.option("--plot", type=click.Path(), help="Draw it here (png, svg or pdf).")
@_JSON
def sweep(
    points: int,
    times: Times,
    cache: str | None,
    out: str | None,
    plot: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """The frontier of memory and time, baselines marked on it."""
    check_writable(out, plot, json_path)
    problem = problem_of(**flags)
    from evoplan.planner.plan import write_json
    from evoplan.planner.planning import sweep as sweep_frontier
    from evoplan.planner.plot import plot_sweep
    from evoplan.planner.report import print_sweep

    if not problem.training:
        raise ValueError("sweep is for training; for inference ask plan for one budget after another")

    with progress("loading torch") as update:
        from evoplan.planner.timing import cost_with_times

        problem = problem.model_copy(update={"budget_bytes": None})
        costed = cost_with_times(problem, times, cache, progress=lambda name: update(f"tracing {name}"))
        update("solving")
        document = sweep_frontier(costed, points, update)
    print_sweep(document, console_for_output())
    for path in filter(None, (out, json_path)):
        write_json(path, document)
    if plot:
        plot_sweep(document, plot)
        click.echo(f"picture written to {plot}")


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option("--msa", type=click.Path(), help="Alignment in A3M, FASTA or Stockholm; else random data.")
@click.option("--skip-bad", is_flag=True, help="Leave out the bad sequences of --msa, and say how many.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True)
@click.option("--learning-rate", type=Number(0, 1e3, min_open=True), default=2e-4, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="That train together on batches of their own, under torchrun.",
)
@click.option(
    "--timeout",
    type=Number(1, 86400),
    default=60,
    show_default=True,
    help="Seconds after which a rank that hangs ends the run.",
)
@click.option("--snapshots", type=click.Path(), help="Folder to write snapshots to, and to resume from.")
@click.option(
    "--save-every", type=click.IntRange(1), help="Steps between snapshots; one more after the last."
)
@click.option("--resume", is_flag=True, help="Go on from the newest complete snapshot.")
@_JSON
def run(plan_file: str, timeout: float, json_path: str | None, **flags: Any) -> None:
    """Train (masked-MSA loss) or infer under a plan; print predicted beside measured.

    Alone, or on several processes: torchrun --nproc_per_node=N -m evoplan.planner run ...
    """
    from evoplan.planner.world import joined

    with joined(timeout) as world:
        check_writable(json_path)
        if not flags["snapshots"] and (flags["save_every"] or flags["resume"]):
            raise ValueError("--save-every and --resume need a folder: add --snapshots DIR")
        check_skip_bad(flags["msa"], flags["skip_bad"])
        from evoplan.planner.plan import load_plan, write_json
        from evoplan.planner.run import Settings, run_plan
        from evoplan.planner.world import check_world

        found, settings = load_plan(plan_file), Settings(**flags)
        command = f"run {plan_file} --replicas {settings.replicas}"
        check_world(found, world, command, settings.replicas, settings.agreed())
        document = run_plan(found, settings, console_for_output(), world)
        if json_path and world.first:
            write_json(json_path, document)
    sys.exit(0 if document["ok"] else CHECK_FAILED)


def main(arguments: list[str] | None = None) -> None:
    """The program `evoplan`."""
    run_command(cli, "evoplan", arguments)
