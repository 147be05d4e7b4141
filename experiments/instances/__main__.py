"""Solvers on named instances of the planner's problem, against best known times and proven bounds.

    python -m evoplan.experiments.instances list
    python -m evoplan.experiments.instances score SOLVER|file.py:function [--only NAME,...] [--json FILE]
    python -m evoplan.experiments.instances make [--only NAME,...] [--folder DIR]

A solver takes a cost table and a budget in bytes and returns a schedule, as evoplan's own do (dp, cp-sat,
seed-dp, ...; rotor is here, too). It raises InfeasibleError where it finds nothing. A schedule that takes
more than the budget by the replay is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from evoplan.experiments.instances.catalogue import FOLDER, INSTANCES, make, read, write
from evoplan.experiments.instances.scoring import Score, found_solver, score
from evoplan.planner.commands.terminal import console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size

only_option = click.option("--only", help="Names of instances with commas between; else all of them.")


def chosen(only: str | None, there: list[str]) -> list[str]:
    """The names that were asked for; ValueError lists those that there are."""
    names = there if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in there:
            raise ValueError(f"unknown instance {name!r}; choose of: {', '.join(there)}")
    return names


def kept(folder: Path) -> list[str]:
    """Instances whose files are in a folder: the catalogue's in its order, then others."""
    there = {path.stem for path in folder.glob("*.json")}
    return [*(name for name in INSTANCES if name in there), *sorted(there - set(INSTANCES))]


@click.group()
def instances() -> None:
    """Named instances, and solvers on them."""


@instances.command("list")
def listing() -> None:
    """What instances there are."""
    for name in kept(FOLDER):
        table, best = read(name)
        about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["about"]
        click.echo(f"{name}: {about}; {len(table.options)} steps, {len(best)} budgets")


@instances.command("make")
@only_option
@click.option("--folder", type=click.Path(file_okay=False, exists=True, path_type=Path), default=FOLDER)
def making(only: str | None, folder: Path) -> None:
    """Trace the instances anew and solve them."""
    for name in chosen(only, list(INSTANCES)):
        path = write(make(INSTANCES[name]), folder)
        click.echo(f"{name}: {path} ({format_size(path.stat().st_size)})")


@instances.command("score")
@click.argument("solver")
@only_option
@click.option("--json", "json_path", type=click.Path(), help="Also write the scores as JSON.")
@click.option("--folder", type=click.Path(file_okay=False, exists=True, path_type=Path), default=FOLDER)
def scoring(solver: str, only: str | None, json_path: str | None, folder: Path) -> None:
    """How a solver does: its times over the best known, and over what is proven."""
    check_writable(json_path=json_path, reads=(solver.rpartition(":")[0],))
    find, names = found_solver(solver), chosen(only, kept(folder))
    console = console_for_output(json_path=json_path)
    table = new_table(solver, "instance", "budget", "step time", "over best", "over bound", "took")
    found: list[Score] = []
    with progress("scoring") as say:
        for name in names:
            say(name)
            for each in score(find, name, folder):
                found.append(each)
                table.add_row(*_cells(each))
            say.done(f"{name}: done")
    print_table(table, console, keys=2)
    ratios = [each.over_best for each in found if each.over_best is not None]
    console.print(f"fits {len(ratios)} of {len(found)} budgets" + _worst(ratios))
    if json_path:
        write_json(json_path, {"solver": solver, "scores": [asdict(each) for each in found]})


def _worst(ratios: list[float]) -> str:
    if not ratios:
        return ""
    return f"; over the best known: {sum(ratios) / len(ratios):.4f} on average, {max(ratios):.4f} at worst"


def _cells(each: Score) -> list[str]:
    budget, took = format_size(each.budget_bytes), format_seconds(each.solver_seconds)
    if each.step_seconds is None or each.over_best is None or each.over_bound is None:
        return [each.instance, budget, "nothing fits", "-", "-", took]
    step = format_seconds(each.step_seconds)
    return [each.instance, budget, step, f"{each.over_best:.4f}", f"{each.over_bound:.4f}", took]


if __name__ == "__main__":
    run_command(instances, "python -m evoplan.experiments.instances")
