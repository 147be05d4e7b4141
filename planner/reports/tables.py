"""What all tables have in common."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from evoplan.model.running.chain import Chain
from evoplan.planner.problems.costing import planned_model
from evoplan.planner.problems.problem import Problem
from evoplan.planner.sizes import exact_size

if TYPE_CHECKING:
    pass


def describe_problem(problem: Problem) -> str:
    """One line."""
    config, shape = problem.config, problem.shape
    budget = "no budget" if problem.budget_bytes is None else f"budget {exact_size(problem.budget_bytes)}"
    ranks = f" on each of {problem.ranks} ranks" if problem.ranks > 1 else ""
    return (
        f"{problem.model}: {config.n_block} blocks, {shape}, "
        f"{problem.precision} {problem.mode} on {problem.device}, {budget}{ranks}"
    )


def new_table(title: str, *columns: str) -> Table:
    """The first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


@cache
def step_names(problem: Problem) -> list[str]:
    """Qualified names of the steps that a problem's plan is for, in order."""
    return [step.name for step in Chain.of(planned_model(problem)).steps]


def fold(lines: list[str], limit: int = 60) -> list[str]:
    """At most `limit` lines: the middle is counted, not shown."""
    if len(lines) <= limit:
        return lines
    half = limit // 2
    return [
        *lines[:half],
        f"... {len(lines) - 2 * half} lines more; all are in the plan file ...",
        *lines[-half:],
    ]
