"""The main job, end to end, on a real alignment: plan, train under the plan, compare, draw.

    python -m evoplan.experiments.demo [FOLDER]

Takes s and r from ubiquitin and its relatives, plans AlphaFold 2's Evoformer (four blocks at full
width) for a quarter of what plain training needs, trains it on a masked-MSA loss under that plan,
prints predicted beside measured, and draws the frontier of memory and time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from evoplan.model.config import InputShape
from evoplan.model.data.alignment import read_alignment
from evoplan.model.families import preset
from evoplan.planner.checking.verify import verify_plan
from evoplan.planner.commands.terminal import CHECK_FAILED, console_for_output, run_command
from evoplan.planner.files import check_writable, make_folder, write_json
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sweeping import sweep
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.checks import print_verification
from evoplan.planner.reports.plans import print_plan
from evoplan.planner.reports.plot import plot_sweep
from evoplan.planner.runs.run import Settings, run_plan

ALIGNMENT = Path(__file__).parent / "data" / "ubiquitin.a3m"
BUDGET = 240 * 2**20
N_BLOCK = 4
STEPS = 12


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path), default="demo")
def command(folder: Path) -> None:
    """Write the plan and the frontier to FOLDER; exit code 1 if a promise was not kept."""
    console = console_for_output()
    make_folder(folder)
    check_writable(*(folder / name for name in ("plan.json", "frontier.json", "frontier.png")))
    alignment = read_alignment(ALIGNMENT)
    console.print(
        f"{ALIGNMENT.name}: {alignment.n_seq} sequences of {alignment.n_res} residues", highlight=False
    )
    problem = Problem(
        model="alphafold2",
        config=preset("alphafold2").config.with_blocks(N_BLOCK),
        shape=InputShape(alignment.n_seq, alignment.n_res),
        budget_bytes=BUDGET,
    )
    with console.status("tracing") as status:
        costed = cost_problem(problem, progress=lambda name: status.update(f"tracing {name}"))
    plan = solve(costed)
    plan.save(folder / "plan.json")
    print_plan(plan, console)

    console.print("\nthe frontier", style="bold")
    with console.status("solving"):
        frontier = sweep(costed)
    write_json(folder / "frontier.json", frontier)
    plot_sweep(frontier, folder / "frontier.png", plan.predicted.model_dump())
    console.print(f"picture: {folder / 'frontier.png'}", highlight=False)

    console.print("\ntraining under the plan", style="bold")
    trained = run_plan(plan, Settings(steps=STEPS, msa=str(ALIGNMENT)), console)

    console.print("\nwith and without the plan", style="bold")
    with console.status("measuring"):
        found = verify_plan(None, plan)
    print_verification(found, console)
    sys.exit(0 if trained["ok"] and found.ok else CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.demo")
