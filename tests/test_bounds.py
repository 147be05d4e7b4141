"""Second opinions on the dynamic program: CP-SAT, lower bounds, the flat program; against brute force too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.solvers import BASELINES, Frontier, cp_sat
from evoplan.planner.solvers.bounds import LowerBound
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.seed_dp import SeedProgram
from tests.brute_force import by_charges, least_seconds
from tests.test_dp import UNITS, cases, stacked, tables


def check(table: CostTable, memory: int, max_depth: int, expected: float) -> None:
    """CP-SAT's answer within `memory` bytes beside the outputs."""
    outputs = table.bytes_of(table.liveness.outputs)
    found = cp_sat.answer(table, outputs + memory, max_depth, units=max(1, memory))
    assert found.seconds == pytest.approx(expected)
    assert found.bound_seconds == pytest.approx(expected)
    for known in (expected, 0.9 * expected):  # one of the class, and one that is faster than all of it
        told = cp_sat.answer(
            table, outputs + memory, max_depth, optimistic=True, units=max(1, memory), known_seconds=known
        )
        assert told.bound_seconds == pytest.approx(known)
    if found.schedule is not None:
        played = replay(found.schedule, table)
        assert played.peak_bytes <= outputs + memory
        assert played.seconds <= expected + 1e-6
        assert depth(found.schedule) <= max_depth


@cases(40)
@given(tables(steps=(1, 4)), st.sampled_from([0, 1]), st.integers(0, UNITS) | st.integers(50, UNITS))
def test_cp_sat_finds_the_optimum_step_by_step(table: CostTable, max_depth: int, memory: int) -> None:
    check(table, memory, max_depth, least_seconds(table, UNITS, by_charges, max_depth)[memory])


@cases(30)
@given(
    tables(steps=(1, 2)),
    st.integers(2, 5),
    st.sampled_from([0, 1]),
    st.integers(0, 2 * UNITS) | st.integers(UNITS, 2 * UNITS),
)
def test_cp_sat_finds_the_optimum_by_counts(
    table: CostTable, times: int, max_depth: int, memory: int
) -> None:
    """Equal groups, in whichever order is best: the program keeps the chain's."""
    stack = stacked(table, times)
    expected = Program(stack, 1, 2 * UNITS, max_depth).times[memory]
    steps, cp_sat.SHORT = cp_sat.SHORT, 0  # by counts, however short
    try:
        check(stack, memory, max_depth, expected)
    finally:
        cp_sat.SHORT = steps


@cases(20)
@given(tables(steps=(2, 3)), st.sampled_from([0, 1]))
def test_cp_sat_by_counts_agrees_with_brute_force(table: CostTable, max_depth: int) -> None:
    stack = stacked(table, 2) if len(table.options) == 2 else replace(table, groups=(range(3),))
    optimum = least_seconds(stack, UNITS, by_charges, max_depth)
    steps, cp_sat.SHORT = cp_sat.SHORT, 0
    try:
        for memory in [i for i in range(1, UNITS) if optimum[i] < optimum[i - 1]][:4]:
            check(stack, int(memory), max_depth, optimum[memory])
    finally:
        cp_sat.SHORT = steps


def test_cp_sat_says_where_it_does_not_apply(stack_table: CostTable) -> None:
    groups = (range(9), range(9, 18), range(18, 26))
    odd = replace(
        stack_table,
        options=stack_table.options + stack_table.options[:8],
        step_reads=stack_table.step_reads + stack_table.step_reads[:8],
        groups=groups,
    )
    with pytest.raises(ValueError, match="--solver dp"):
        cp_sat.answer(odd, None)


@cases(60)
@given(tables(steps=(1, 4)), st.integers(3, 40), st.sampled_from([None, 0, 1]))
def test_no_schedule_beats_a_bound(table: CostTable, units: int, max_depth: int | None) -> None:
    optimum = least_seconds(table, UNITS, by_charges, 2 if max_depth is None else max_depth)
    bound = LowerBound(table, max_depth, units=units)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in range(0, UNITS, 7):
        assert bound.seconds(outputs + memory) <= optimum[memory] + 1e-9
        assert bound.seconds(outputs + memory, enough=np.inf) == pytest.approx(optimum[memory])
    exact = LowerBound(table, max_depth, units=UNITS)
    times = Program(table, 1, UNITS, max_depth).times
    for memory in range(1, UNITS, 11):
        assert exact.seconds(outputs + memory) == pytest.approx(times[memory])


def test_the_gap_is_small_on_real_costs(stack_table: CostTable) -> None:
    frontier, bound = Frontier(stack_table), LowerBound(stack_table)
    for budget in frontier.budgets(10)[1:]:
        assert frontier.seconds(budget) <= 1.01 * bound.seconds(budget)


def test_limited_checkpoints_lose_little_on_real_costs(
    stack_table: CostTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the share of the chain's length that a thousand blocks have."""
    chain = stacked(stack_table, 24)
    free = Frontier(chain)
    monkeypatch.setattr("evoplan.planner.solvers.frontier.LONG", 6)
    limited = Frontier(chain)
    for budget in free.budgets(60):
        assert limited.seconds(budget) <= 1.001 * free.seconds(budget)
    for budget in free.budgets(5):
        assert replay(limited.schedule(budget), chain).peak_bytes <= budget


@pytest.mark.parametrize("place", [2, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 3))])
def test_the_gap_is_small_at_one_level(stack_table: CostTable, place: int) -> None:
    frontier = Frontier(stack_table, max_depth=1)
    budget = frontier.budgets(4)[place]
    proved = cp_sat.answer(stack_table, budget, optimistic=True).bound_seconds
    assert proved <= frontier.seconds(budget)
    assert frontier.seconds(int(1.005 * budget)) <= 1.01 * proved


@cases(60)
@given(tables(steps=(1, 6), most=3, read_all=True, whole=True))
def test_the_flat_program_keeps_its_budget(table: CostTable) -> None:
    """And the dynamic program, which has all that it has, is never slower at the peak that it reached."""
    program, frontier = SeedProgram(table), Frontier(table)
    least = replay(program.least(), table).peak_bytes
    for budget in range(least, least + 60, 13):
        schedule = program.schedule(budget)
        if schedule is None:
            continue
        played = replay(schedule, table)
        assert played.peak_bytes <= budget
        slack = sum(table.state_bytes.values())  # the program's charges exceed the replay's by no more
        assert frontier.seconds(budget + 2 * slack) <= played.seconds


def test_the_flat_program_is_no_better_on_real_costs(stack_table: CostTable) -> None:
    program, frontier = SeedProgram(stack_table), Frontier(stack_table)
    least = replay(program.least(), stack_table).peak_bytes
    most = replay(BASELINES["none"](stack_table), stack_table).peak_bytes
    for budget in np.geomspace(1.1 * least, most, 5):
        schedule = program.schedule(int(budget))
        assert schedule is not None
        played = replay(schedule, stack_table)
        assert played.peak_bytes <= budget
        assert frontier.seconds(played.peak_bytes) <= 1.005 * played.seconds


def test_cp_sat_bounds_stacks_of_more_blocks_than_grid_steps(stack_table: CostTable) -> None:
    """Rounded down, a block may keep nothing: then nothing limits how many there are."""
    one = replace(
        stack_table,
        options=stack_table.options[:9],
        step_reads=stack_table.step_reads[:9],
        groups=(range(9),),
    )
    deep = stacked(one, 700)
    most = replay(BASELINES["none"](deep), deep)
    found = cp_sat.answer(deep, most.peak_bytes, max_depth=0, optimistic=True, limit=5)
    assert found.bound_seconds <= most.seconds
