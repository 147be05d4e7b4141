"""The frontier over several grids, those of them that need not be solved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.planner.schedules.replay import replay
from evoplan.planner.solvers.frontier import Frontier
from tests.test_dp import cases, starts, tables

SCALE = 997  # bytes for one of a random table's: no grid step divides it


def times_longer(table: CostTable, times: int, scale: int = 1) -> CostTable:
    """A chain so many times as long, and its sizes that many times as large."""

    def scaled(cost: StepCost) -> StepCost:
        sizes = ("forward_bytes", "preserved_bytes", "backward_bytes", "discard_bytes")
        return replace(cost, **{name: scale * getattr(cost, name) for name in sizes})

    groups = times * table.groups
    return replace(
        table,
        options=tuple(tuple(map(scaled, step)) for step in table.options) * times,
        step_reads=table.step_reads * times,
        groups=tuple(range(at, at + len(g)) for g, at in zip(groups, starts(groups), strict=True)),
        units=(),
        state_bytes={name: scale * size for name, size in table.state_bytes.items()},
        loss_bytes=scale * table.loss_bytes,
    )


def check_against_all_grids(table: CostTable) -> None:
    """The same schedules as with every grid solved."""
    few, every = Frontier(table), Frontier(table)
    for budget in every.budgets(8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Frontier, "_beaten", lambda *_: False)
            seconds = every.seconds(budget)
            schedule = every.schedule(budget) if np.isfinite(seconds) else None
        assert few.seconds(budget) == seconds
        assert schedule is None or Frontier(table).schedule(budget) == schedule


def solved_for(table: CostTable, budget: int) -> list[int]:
    """The grids that are solved for the schedule within a budget."""
    frontier = Frontier(table)
    frontier.schedule(budget)
    return sorted(frontier._times)


@pytest.mark.parametrize("units", [16, 400])
@cases(32)
@given(tables(steps=(2, 3), most=3), st.integers(2, 8))
def test_grids_that_are_not_solved_have_no_answer(units: int, table: CostTable, times: int) -> None:
    """Where rounding matters much and where it does not: which grids there are makes no schedule another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.frontier.UNITS", units)
        check_against_all_grids(times_longer(table, times, SCALE))


def test_one_grid_is_enough_for_a_large_budget(stack_table: CostTable) -> None:
    """On real costs: the finer ones have schedules for much less memory, which take longer."""
    table = times_longer(stack_table, 6)
    frontier = Frontier(table)
    for index in range(2, len(frontier.spans)):
        assert solved_for(table, frontier.output_bytes + frontier.spans[index]) == [index]


def test_of_long_chains_every_grid_is_asked(stack_table: CostTable) -> None:
    """Coarser ones leave out long checkpoints, so that what they find is no bound on finer ones."""
    table = times_longer(stack_table, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.frontier.MANY", 1)
        frontier = Frontier(table)
        answers = frontier._answers(frontier.output_bytes + frontier.spans[-1])
        assert [index for _, index, _ in answers] == [*range(len(frontier.spans))]


@cases(40)
@given(tables(steps=(2, 3), most=3), st.integers(2, 8))
def test_steep_falls_come_at_exact_peaks(table: CostTable, times: int) -> None:
    """On a coarse grid: never later than without a look ahead, and more budget is never slower."""
    chain = times_longer(table, times, SCALE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.frontier.UNITS", 60)
        ahead, blind = Frontier(chain), Frontier(chain)
        patch.setattr(Frontier, "_ahead", lambda *_: [])
        rounded = blind.steps()
        patch.undo()
        patch.setattr("evoplan.planner.solvers.frontier.UNITS", 60)
        steps = ahead.steps()
        assert all(ahead.seconds(budget) <= seconds for budget, seconds in rounded)
        assert [seconds for _, seconds in steps] == sorted((seconds for _, seconds in steps), reverse=True)
        for budget, seconds in steps:
            assert ahead.seconds(budget - 1) > ahead.seconds(budget) == seconds
            assert replay(ahead.schedule(budget), chain).peak_bytes <= budget


def test_a_look_ahead_finds_what_rounding_hides(stack_table: CostTable) -> None:
    """A grid of few steps, on real costs: times close to those of a fine one."""
    fine = Frontier(stack_table)
    budgets = fine.budgets(60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.frontier.UNITS", 500)
        coarse = Frontier(stack_table)
        found = [coarse.seconds(budget) / fine.seconds(budget) for budget in budgets]
        patch.setattr(Frontier, "_ahead", lambda *_: [])
        blind = Frontier(stack_table)
        rounded = [blind.seconds(budget) / fine.seconds(budget) for budget in budgets]
    assert max(found) - 1 < (max(rounded) - 1) / 2
