"""Solvers by name: each turns a cost table and a budget into a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.solvers import baselines
from evoplan.planner.solvers.frontier import Frontier, InfeasibleError
from evoplan.planner.solvers.inference import inference_schedule
from evoplan.planner.solvers.offload_frontier import OffloadFrontier
from evoplan.planner.solvers.seed_dp import SeedProgram

Find = Callable[[CostTable, int | None], Sequence]


@dataclass(frozen=True)
class Solver:
    """How a schedule is found, and what may be said of it.

    Attributes:
        find: from a table and a budget in bytes (None: no limit); raises InfeasibleError.
        exact_in_inference: whether no schedule on offer is faster in inference, where that is proven.
        uses_host: whether in training it lets wait in host memory what may.
    """

    find: Find
    exact_in_inference: bool = False
    uses_host: bool = False

    def __call__(self, table: CostTable, budget_bytes: int | None) -> Sequence:
        """A schedule within the budget."""
        return self.find(table, budget_bytes)


def dynamic_program(table: CostTable, budget_bytes: int | None) -> Sequence:
    """`dp`: the fastest schedule within the budget."""
    if not table.training:
        return inference_schedule(table, budget_bytes)
    if table.host_bytes:
        return OffloadFrontier(table, table.host_bytes).schedule(budget_bytes)
    return Frontier(table).schedule(budget_bytes)


def by_cp_sat(table: CostTable, budget_bytes: int | None) -> Sequence:
    """`cp-sat`: CP-SAT's fastest schedule with checkpoints at most one deep."""
    if not table.training:
        return inference_schedule(table, budget_bytes)
    from evoplan.planner.solvers import cp_sat  # OR-Tools takes a while to import

    found = cp_sat.answer(table, budget_bytes)
    if found.schedule is not None:
        return found.schedule
    if budget_bytes is None or math.isfinite(found.bound_seconds):
        raise ValueError("cp-sat found no schedule in as much search as it is given; use --solver dp")
    # Nothing fits on its coarse grid; the least schedule may fit all the same.
    frontier = Frontier(table, max_depth=1)
    if frontier.least_replay.peak_bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, frontier.least_replay)
    return frontier.least


def flat_program(table: CostTable, budget_bytes: int | None) -> Sequence:
    """`seed-dp`: the flat program over submodules, with its looser maximum."""
    if not table.training:
        return inference_schedule(table, budget_bytes)
    program = SeedProgram(table)
    found = program.schedule(budget_bytes)
    if found is None and budget_bytes is not None:
        found = program.least()
        played = replay(found, table)
        if played.peak_bytes > budget_bytes:
            raise InfeasibleError(budget_bytes, played)
    assert found is not None  # without a budget everything fits
    return found


# What people do by hand, whatever the budget.
BASELINES: dict[str, Callable[[CostTable], Sequence]] = {
    "none": baselines.keep_everything,
    "small": baselines.every_submodule,
    "large": baselines.every_block,
    "sqrt": baselines.square_root,
}


def _of_any_budget(make: Callable[[CostTable], Sequence]) -> Find:
    return lambda table, _: make(table)


# In inference three of them are one: a shortest path (`solvers.inference`). A bare function claims nothing.
SOLVERS: dict[str, Solver | Find] = {
    "dp": Solver(dynamic_program, exact_in_inference=True, uses_host=True),
    "cp-sat": Solver(by_cp_sat, exact_in_inference=True),
    **{name: _of_any_budget(make) for name, make in BASELINES.items()},
    "seed-dp": Solver(flat_program, exact_in_inference=True),
}


def solver(name: str) -> Solver:
    """Look a solver up; raises ValueError that lists the names."""
    try:
        found = SOLVERS[name]
    except KeyError:
        raise ValueError(f"unknown solver {name!r}; choose one of: {', '.join(SOLVERS)}") from None
    return found if isinstance(found, Solver) else Solver(found)


__all__ = ["BASELINES", "SOLVERS", "Frontier", "InfeasibleError", "Solver", "solver"]
