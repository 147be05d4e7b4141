"""AlphaFold 2's Evoformer under the original benchmark's policies, with the planner beside them.

    python -m evoplan.experiments.alphafold2 --policy single --schedule large
    python -m evoplan.experiments.alphafold2 --policy extra-single --schedule planned --memory 4GiB
    torchrun --nproc_per_node=2 -m evoplan.experiments.alphafold2 --policy dap --schedule planned --measure
    python -m evoplan.experiments.alphafold2 --tables

Full sizes are simulated: the schedule is run on tensors without data, and times come from the roofline of
a device. With --measure a reduced size is run here for real.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import click
from rich.console import Console

from evoplan.cost_model.devices import DEVICES
from evoplan.experiments.policies import POLICIES, SCHEDULES, figures, original, plan_under
from evoplan.planner.checking.verify import Verification, verify_on, verify_plan
from evoplan.planner.commands.flags import Size, json_option
from evoplan.planner.commands.terminal import CHECK_FAILED, console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.plans.plan import SolverReport
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.processes.world import World, joined
from evoplan.planner.reports.checks import print_rank_verifications, print_verification
from evoplan.planner.reports.tables import describe_problem, new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size

MB = 2**20  # the original tables' unit


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--policy", type=click.Choice(list(POLICIES)), help="What is run, and on how many devices.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="planned", show_default=True)
@click.option("--n-seq", type=click.IntRange(1), help="Rows s; else the original shapes, each in turn.")
@click.option("--n-res", type=click.IntRange(1), help="Residues r.")
@click.option("--blocks", type=click.IntRange(1), help="Else all.")
@click.option("--ranks", type=click.IntRange(1), help="Devices that share one input; else the policy's.")
@click.option(
    "--device", type=click.Choice(list(DEVICES)), default="v100-32gb", show_default=True,
    help="Whose times and allocator to assume.",
)  # fmt: skip
@click.option("--memory", type=Size(), help="Budget for planned and chunk; else the device's memory.")
@click.option("--measure", is_flag=True, help="Run a reduced size here in float32, beside the plain model.")
@click.option("--tables", is_flag=True, help="Make all of the original tables anew: docs/alphafold2.md.")
@json_option
def command(
    policy: str | None, schedule: str, measure: bool, tables: bool, json_path: str | None, **asked: Any
) -> None:
    """Run AlphaFold 2's Evoformer under one of the original benchmark's policies and a schedule."""
    check_writable(json_path=json_path)
    if tables:
        if policy is not None or json_path is not None:
            raise ValueError("--tables makes all policies' and writes where it always does; give it alone")
        from evoplan.experiments.tables import make_tables

        make_tables(console_for_output())
    elif policy is None:
        raise ValueError(f"name a --policy ({', '.join(POLICIES)}), or make all --tables")
    elif measure:
        if asked["ranks"] is not None:
            raise ValueError(
                "--measure runs on the ranks that are there; start as many with torchrun, without --ranks"
            )
        with joined(timeout=60) as world:
            results = measured(policy, schedule, world, asked | {"json_path": json_path})
            if world.first and json_path:
                write_json(json_path, {"rows": [result.to_json() for result in results]})
        sys.exit(0 if all(result.ok for result in results) else CHECK_FAILED)
    else:
        rows = simulated(policy, schedule, asked, console_for_output(json_path=json_path))
        if json_path:
            write_json(json_path, {"policy": policy, "schedule": schedule, "rows": rows})


def simulated(policy: str, schedule: str, asked: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Print and return the figures of a policy's full sizes."""
    chosen, device = POLICIES[policy], asked["device"]
    shapes = dict.fromkeys((asked["n_seq"] or s, asked["n_res"] or r) for s, r in chosen.shapes)
    table = new_table(
        f"{policy}, {schedule}: simulated, times from the roofline of {device}; original: measured",
        "s, r", "devices", "peak of each", "after forward", "step", "original",
    )  # fmt: skip
    rows = []
    counts = [asked["ranks"]] if asked["ranks"] else chosen.ranks
    with progress("simulating") as say:
        for shape, ranks in product(shapes, counts):
            costed = cost_problem(chosen.problem(shape, ranks, device, asked["blocks"]))
            plan = plan_under(costed, schedule, asked["memory"] or DEVICES[device].memory_bytes)
            row = figures(costed, plan)
            beside = original(policy, schedule, shape, ranks) if asked["blocks"] is None else None
            rows.append({"n_seq": shape[0], "n_res": shape[1], "ranks": ranks, **row, "original": beside})
            held = row["held_bytes"]
            table.add_row(
                f"{shape[0]}, {shape[1]}", str(ranks), format_size(row["peak_bytes"]),
                "-" if held is None else format_size(held), format_seconds(row["step_seconds"]),
                described(beside),
            )  # fmt: skip
            say.done(f"s={shape[0]}, r={shape[1]} on {ranks}: {format_size(row['peak_bytes'])}")
    print_table(table, console, keys=2)
    return rows


def described(row: dict[str, Any] | None) -> str:
    """An original figure in a cell."""
    if row is None:
        return "-"
    if row["peak_mb"] is None:
        return f"{row['schedule']}: out of memory"
    return f"{row['schedule']}: {format_size(row['peak_mb'] * MB)}, {format_seconds(row['step_ms'] / 1000)}"


def measured(policy: str, schedule: str, world: World, asked: dict[str, Any]) -> list[Verification]:
    """Run a policy's reduced size on this machine, on as many ranks as were started.

    Raises:
        ValueError: the policy needs several ranks and this is one, or the other way round.
    """
    chosen = POLICIES[policy]
    blocks, n_seq, n_res = chosen.reduced
    shape = (asked["n_seq"] or n_seq, asked["n_res"] or n_res)
    if (world.size > 1) != (chosen.ranks[0] > 1):
        start = f"torchrun --nproc_per_node={chosen.ranks[0]}" if chosen.ranks[0] > 1 else "python"
        raise ValueError(f"--policy {policy} runs on {chosen.ranks} ranks; start it with `{start} -m ...`")
    problem = chosen.problem(shape, world.size, "cpu", asked["blocks"] or blocks, dtype="float32")
    costed = cost_problem(problem)
    budget = asked["memory"]
    if budget is None and schedule in ("planned", "chunk"):
        budget = halfway(costed)
    plan = plan_under(costed, schedule, budget)
    # Every rank has made the plan, in a time of its own.
    plan = plan.model_copy(update={"solver": SolverReport(name=schedule, seconds=0.0)})
    if world.size == 1:
        results = [verify_plan(None, plan)]
    else:
        results = verify_on(world, plan, 3, "evoplan.experiments.alphafold2")
    if world.first:
        console = console_for_output(json_path=asked["json_path"])
        console.print(f"{policy}, {schedule}: {describe_problem(plan.problem)}", highlight=False)
        print_verification(results[0], console, world.size)
        print_rank_verifications(results, console)
    return results


def halfway(costed: Costed) -> int:
    """A budget in the (geometric) middle between the least and what the fastest plan needs."""
    most = plan_under(costed, "planned", None).predicted.peak_bytes
    try:
        plan_under(costed, "planned", 1)
    except NoPlanError as error:
        middle: float = (error.least_feasible_bytes * most) ** 0.5
        return round(middle)
    raise AssertionError("nothing fits one byte")


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.alphafold2")
