"""The command line: reads arguments, calls the planner, prints. Only commands import torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from evoplan.planner.commands import certificates
from evoplan.planner.commands.capacity import fit_table
from evoplan.planner.commands.flags import (
    AUTO,
    REPEATS,
    STEPS,
    Number,
    cache_option,
    check_skip_bad,
    files_read,
    json_option,
    problem_of,
    problem_options,
    times_option,
)
from evoplan.planner.commands.foreign import inspect, plan_from
from evoplan.planner.commands.roofline import roofline
from evoplan.planner.commands.show import show
from evoplan.planner.commands.sweeps import sweep
from evoplan.planner.commands.terminal import CHECK_FAILED, console_for_output, loading, progress, run_command
from evoplan.planner.commands.times import profile
from evoplan.planner.files import check_writable, write_json

if TYPE_CHECKING:
    from evoplan.planner.problems.timing import Times


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="evoplan")
def cli() -> None:
    """Plan, run and verify Evoformer stacks, and any other model's blocks, within a memory budget."""


cli.add_command(roofline)
cli.add_command(profile)
cli.add_command(show)
cli.add_command(inspect)
cli.add_command(sweep)
cli.add_command(certificates.certify)
cli.add_command(fit_table)


@cli.command()
@problem_options
@click.option(
    "--solver", "solver_name", default="dp", show_default=True,
    help="dp, cp-sat, none, small, large, sqrt or seed-dp.",
)  # fmt: skip
@click.option("--certify", is_flag=True, help="Also prove how far from optimal the plan may be.")
@times_option
@cache_option
@click.option(
    "--donate",
    is_flag=True,
    help="In inference, a step takes the state that it is given, writes over it and lets go of it.",
)
@click.option("--from", "source", metavar="FILE.py:FUNCTION", help="Plan a model that somebody wrote.")
@click.option("--out", type=click.Path(), help="Write the plan here.")
@json_option
def plan(
    solver_name: str,
    certify: bool,
    times: Times,
    cache: str | None,
    source: str | None,
    out: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """Find the fastest schedule that fits; print it and what it saves. With --from of any model."""
    check_writable(out, json_path=json_path, reads=files_read(cache, source=source, **flags))
    if source is not None:
        plan_from(source, flags, out, json_path, certify)
        return
    if flags["donate"] and flags["mode"] != "inference":
        raise ValueError("--donate is for inference: add --mode inference, or leave it out")
    auto = flags["ranks"] == AUTO
    problem = problem_of(**flags | {"ranks": 1} if auto else flags)
    with loading():
        from evoplan.planner.plans.planning import NoPlanError, cost_and_solve, solve_for_fewest_ranks
        from evoplan.planner.reports.plans import print_plan
        from evoplan.planner.solvers import solver

    solver(solver_name)  # a wrong name is said before the work
    try:
        with progress("loading torch") as update:
            if auto:
                costed, found = solve_for_fewest_ranks(problem, solver_name, update, times, cache)
            else:
                costed, found = cost_and_solve(problem, solver_name, times, cache, update)
            if certify:
                from evoplan.planner.plans.certify import certify as with_certificates

                found = with_certificates(costed, found, update)
    except NoPlanError as error:
        if json_path:
            least = {"least_feasible_bytes": error.least_feasible_bytes, "budget_bytes": problem.budget_bytes}
            write_json(json_path, least)
        raise
    for path in filter(None, (out, json_path)):  # before it is printed, which may fail
        found.save(path)
    console = console_for_output(json_path=json_path)
    print_plan(found, console)
    if out:
        console.print(f"plan written to {out}", highlight=False, soft_wrap=True)


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option(
    "--simulate", is_flag=True, help="Memory only, on fake tensors: for what this machine cannot hold."
)
@click.option("--blocks", type=click.IntRange(1), help="Only the first K blocks of the stack.")
@click.option("--repeats", type=REPEATS, default=3, show_default=True, help="Timed runs; medians count.")
@json_option
def verify(plan_file: str, simulate: bool, blocks: int | None, repeats: int, json_path: str | None) -> None:
    """Apply a plan, measure it here, and compare it with the model without a plan.

    A plan for several ranks: torchrun --nproc_per_node=N -m evoplan.planner verify ...
    """
    from evoplan.planner.processes.world import joined

    with joined(timeout=60) as world:
        check_writable(json_path=json_path, reads=(plan_file,))
        from evoplan.planner.checking.consistency import load_consistent
        from evoplan.planner.checking.verify import simulate_plan, verify_on, verify_plan
        from evoplan.planner.plans.planning import shorten_plan
        from evoplan.planner.reports.checks import print_rank_verifications, print_verification
        from evoplan.planner.reports.tables import describe_problem

        found = load_consistent(plan_file)
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
            if json_path:
                ranks = [{"rank": rank, **result.to_json()} for rank, result in enumerate(results)]
                write_json(json_path, results[0].to_json() | ({"ranks": ranks} if len(ranks) > 1 else {}))
            console = console_for_output(json_path=json_path)
            console.print(describe_problem(found.problem), highlight=False)
            print_verification(results[0], console, found.problem.ranks)
            print_rank_verifications(results, console)
    sys.exit(0 if all(result.ok for result in results) else CHECK_FAILED)


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option("--msa", type=click.Path(), help="Alignment in A3M, FASTA or Stockholm; else random data.")
@click.option("--skip-bad", is_flag=True, help="Leave out the bad sequences of --msa, and say how many.")
@click.option("--steps", type=STEPS, default=3, show_default=True)
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
@click.option("--save-every", type=STEPS, help="Steps between snapshots; one more after the last.")
@click.option("--resume", is_flag=True, help="Go on from the newest complete snapshot.")
@json_option
def run(plan_file: str, timeout: float, json_path: str | None, **flags: Any) -> None:
    """Train (masked-MSA loss) or infer under a plan; print predicted beside measured.

    Alone, or on several processes: torchrun --nproc_per_node=N -m evoplan.planner run ...
    """
    from evoplan.planner.processes.world import joined

    with joined(timeout) as world:
        check_writable(json_path=json_path, reads=(plan_file, flags["msa"]))
        if not flags["snapshots"] and (flags["save_every"] or flags["resume"]):
            raise ValueError("--save-every and --resume need a folder: add --snapshots DIR")
        check_skip_bad(flags["msa"], flags["skip_bad"])
        from evoplan.planner.checking.consistency import load_consistent
        from evoplan.planner.processes.world import check_world
        from evoplan.planner.runs.run import Settings, run_plan

        found, settings = load_consistent(plan_file), Settings(**flags)
        command = f"run {plan_file} --replicas {settings.replicas}"
        agreed = found.identity | settings.agreed()
        check_world(found.problem.ranks, world, command, settings.replicas, agreed)
        document = run_plan(found, settings, console_for_output(json_path=json_path), world)
        if json_path and world.first:
            write_json(json_path, document)
    sys.exit(0 if document["ok"] else CHECK_FAILED)


def main(arguments: list[str] | None = None) -> None:
    """The program `evoplan`."""
    run_command(cli, "evoplan", arguments)
