"""Solvers by name: each turns a cost table and a budget into a schedule."""

from __future__ import annotations

from collections.abc import Callable

from cost_model.costs import CostTable
from planner.schedule import Sequence
from planner.solvers import baselines
from planner.solvers.frontier import Frontier, InfeasibleError, inference_schedule

Solver = Callable[[CostTable, int | None], Sequence]


def dynamic_program(table: CostTable, budget_bytes: int | None) -> Sequence:
    """`dp`: the fastest schedule within the budget."""
    if not table.training:
        return inference_schedule(table, budget_bytes)
    return Frontier(table).schedule(budget_bytes)


BASELINES: dict[str, Callable[[CostTable], Sequence]] = {
    "none": baselines.keep_everything,
    "small": baselines.every_submodule,
    "large": baselines.every_block,
    "sqrt": baselines.square_root,
}

SOLVERS: dict[str, Solver] = {
    "dp": dynamic_program,
    **{name: (lambda table, _, make=make: make(table)) for name, make in BASELINES.items()},
}


def solver(name: str) -> Solver:
    """Look a solver up; raises ValueError that lists the names."""
    try:
        return SOLVERS[name]
    except KeyError:
        raise ValueError(f"unknown solver {name!r}; choose one of: {', '.join(SOLVERS)}") from None


__all__ = ["BASELINES", "SOLVERS", "Frontier", "InfeasibleError", "solver"]
