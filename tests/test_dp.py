"""The dynamic program against every schedule of short random chains, and against the replay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import AsWritten, Forward, StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, depth
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.grid import Times
from evoplan.planner.solvers.reading import Reader
from evoplan.planner.solvers.segments import Race, Segments, Through
from evoplan.planner.solvers.tables import TimesTable
from tests.brute_force import by_charges, by_replay, least_seconds, schedules
from tests.conftest import examples

KINDS = (WHOLE, Strategy("chunk", "row", 2), Strategy("coshard", "sum", 2))
UNITS = 90  # bytes; enough for most schedules of three steps


def cases(count: int) -> settings:
    """So many cases (`make test`: a part of them), the same ones every time."""
    return examples(count, derandomize=True, database=None)


def step_options(
    rng: Random, new: int, gradients: int, strategies: list[Strategy], backward_from: int
) -> tuple[StepCost, ...]:
    """Costs of one step, as a tracer could find them: what is held fits into every peak."""
    options = []
    for strategy in strategies:
        preserved = rng.randint(0, 9) if strategy == WHOLE else 0
        forward, seconds = new + preserved + rng.randint(0, 4), float(rng.randint(1, 9))
        least_backward = gradients + preserved + backward_from
        in_graph = AsWritten(least_backward + rng.randint(0, 6))
        unread = Forward(rng.randint(preserved, forward), Work(), float(rng.randint(0, int(seconds))))
        options.append(
            StepCost(
                strategy,
                forward_bytes=forward,
                preserved_bytes=preserved,
                backward_bytes=least_backward + rng.randint(0, 6),
                discard_bytes=new + rng.randint(0, 6),
                discard_work=Work(),
                forward_work=Work(),
                backward_work=Work(),
                discard_seconds=float(rng.randint(1, 9)),
                forward_seconds=seconds,
                backward_seconds=float(rng.randint(1, 9) + 20 * (strategy != WHOLE) * rng.randint(0, 1)),
                unread=unread if strategy == WHOLE and rng.randint(0, 1) else None,
                as_written=in_graph if strategy == WHOLE and rng.randint(0, 1) else None,
            )
        )
    return tuple(options)


@st.composite
def tables(
    draw: st.DrawFn,
    steps: tuple[int, int] = (1, 3),
    most: int = 2,
    streams: str = "mz",
    read_all: bool = False,
    backward_from: int = 0,
    whole: bool = False,
    several: bool = False,
) -> CostTable:
    """Random chains of one or two groups over the tensors that their steps write.

    Args:
        steps: how many, from and to.
        most: strategies per step.
        read_all: whether each step reads the whole state.
        backward_from: least workspace of a backward.
        whole: whether each step can run whole.
        several: whether some steps rewrite several tensors at once.
    """
    count = draw(st.integers(*steps))
    cut = draw(st.integers(0, count - 1))  # the first step of the second group, 0 for one group
    period = cut if 2 * cut == count and draw(st.booleans()) else count  # two groups may be equal
    targets = draw(st.lists(st.sampled_from(streams), min_size=period, max_size=period))
    names = sorted(set(targets))
    few = st.lists(st.sampled_from(KINDS), min_size=1, max_size=most, unique=True)
    offered = [draw(few) for _ in targets]
    if whole:
        offered = [[WHOLE, *(kind for kind in kinds if kind != WHOLE)][:most] for kinds in offered]
    rng = Random(draw(st.integers(0, 2**32)))
    state = {name: rng.randint(1, 5) for name in names}
    reads = [
        (target, *(name for name in names if name != target and (read_all or rng.random() < 0.5)))
        for target in targets
    ]
    makes = [read[: rng.randint(1, len(read))] if several else read[:1] for read in reads]
    options = [
        step_options(rng, sum(state[name] for name in made), sum(state.values()), strategies, backward_from)
        for made, strategies in zip(makes, offered, strict=True)
    ]
    times = count // period
    return CostTable(
        options=tuple(options * times),
        step_reads=tuple(reads * times),
        groups=(range(cut), range(cut, count)) if cut else (range(count),),
        state_bytes=state,
        loss_bytes=rng.randint(0, 8),
        training=True,
        step_makes=tuple(makes * times) if several else None,
    )


def writes_all(table: CostTable) -> bool:
    """Whether every group rewrites the whole state, as blocks of a model do."""
    return all(
        {name for step in group for name in table.makes[step]} == set(table.state_bytes)
        for group in table.groups
    )


def stacked(table: CostTable, times: int) -> CostTable:
    """A stack of equal groups, each all of the chain's steps."""
    size = len(table.options)
    return replace(
        table,
        options=table.options * times,
        step_reads=table.step_reads * times,
        groups=tuple(range(i, i + size) for i in range(0, times * size, size)),
    )


def check_schedules(program: Program, table: CostTable) -> None:
    """Each distinct schedule read off: in its budget by the replay, and as fast as promised."""
    assert np.all(program.times[1:] <= program.times[:-1])
    reader = Reader(program)
    for memory in range(program.size):
        if not program.times[memory] < (program.times[memory - 1] if memory else np.inf):
            continue
        schedule = reader.schedule(memory)
        played = replay(schedule, table)
        assert played.peak_bytes - played.output_bytes <= memory * program.unit_bytes
        assert played.seconds <= program.times[memory]
        assert played.seconds == program.times[memory] or not writes_all(table)
        assert program.max_depth is None or depth(schedule) <= program.max_depth


def check_optimum(table: CostTable, max_depth: int | None) -> None:
    """The least time at every budget, under the charges that the program makes."""
    program = Program(table, 1, UNITS, max_depth)
    optimum = least_seconds(table, UNITS, by_charges, max_depth)
    np.testing.assert_array_equal(program.times, optimum)
    check_schedules(program, table)


@cases(700)
@given(tables())
def test_it_finds_the_optimum(table: CostTable) -> None:
    check_optimum(table, None)


@cases(100)
@given(tables(most=3))
def test_it_finds_the_optimum_among_more_strategies(table: CostTable) -> None:
    check_optimum(table, None)


@cases(100)
@given(tables(steps=(4, 5), most=1))
def test_it_finds_the_optimum_of_longer_chains(table: CostTable) -> None:
    check_optimum(table, 2)


@cases(60)
@given(tables(steps=(2, 4)))
def test_it_finds_the_optimum_at_two_levels(table: CostTable) -> None:
    check_optimum(table, 2)


@cases(200)
@given(tables(steps=(1, 4), most=1, several=True, streams="mze"), st.sampled_from([None, 1]))
def test_it_finds_the_optimum_where_steps_make_several_tensors(
    table: CostTable, max_depth: int | None
) -> None:
    check_optimum(table, max_depth)


@cases(300)
@given(tables(steps=(2, 4)), st.sampled_from([0, 1]))
def test_it_finds_the_optimum_at_limited_depth(table: CostTable, max_depth: int) -> None:
    check_optimum(table, max_depth)


@cases(150)
@given(tables())
def test_the_replay_bounds_it_from_both_sides(table: CostTable) -> None:
    """Charges exceed the replay by at most the state twice: outputs not made yet or new targets
    that were read already, and what a discarding run holds on top of them.
    """
    slack = 2 * sum(table.state_bytes.values())
    times = Program(table, 1, UNITS).times
    optimum = least_seconds(table, UNITS, by_replay)
    assert np.all(times >= optimum)
    assert np.all(times[slack:] <= optimum[: len(optimum) - slack])


@cases(150)
@given(tables(read_all=True, backward_from=30))
def test_it_is_the_replays_optimum_where_backward_decides(table: CostTable) -> None:
    """The charges differ from the replay's before the loss, and for targets that the next step
    does not read. Where backward needs the most and every step reads everything, they agree.
    """
    times = Program(table, 1, UNITS).times
    np.testing.assert_array_equal(times, least_seconds(table, UNITS, by_replay))


@cases(60)
@given(tables())
def test_no_charge_is_below_the_replay(table: CostTable) -> None:
    """The brute force's two judges; the simpler one is what the program is compared with."""
    for schedule in schedules(table, 2):
        charged, played = by_charges(schedule, table), by_replay(schedule, table)
        assert charged.seconds == played.seconds
        assert charged.peak_bytes >= played.peak_bytes
        assert [step for step, _ in sorted(charged.discards)] == [step for step, _ in sorted(played.discards)]
        assert all(a >= b for a, b in zip(sorted(charged.discards), sorted(played.discards), strict=True))


@cases(150)
@given(tables(steps=(2, 8), most=3), st.integers(1, 7), st.sampled_from([None, 0, 1, 2, 3]))
def test_schedules_keep_their_budget(table: CostTable, unit: int, max_depth: int | None) -> None:
    program = Program(table, unit, -(-150 // unit), max_depth)
    check_schedules(program, table)
    exact = Program(table, 1, unit * (program.size - 1), max_depth).times[::unit]
    assert np.all(program.times >= exact)


@cases(100)
@given(tables(steps=(2, 6), most=3))
def test_more_depth_is_never_slower(table: CostTable) -> None:
    by_depth = [Program(table, 1, UNITS, limit).times for limit in (0, 1, 2, 6, None)]
    for less, more in pairwise(by_depth):
        assert np.all(more <= less)
    np.testing.assert_array_equal(by_depth[-1], by_depth[-2])  # six steps nest no deeper than six


@pytest.mark.parametrize("max_depth", [None, 2])
@cases(20)
@given(tables(steps=(2, 4), most=3))
def test_equal_groups_share_their_solutions(max_depth: int | None, table: CostTable) -> None:
    """Six equal groups cost the same where nothing tells the program that they are equal."""
    six = stacked(table, 6)
    apart = replace(six, options=tuple(tuple(replace(cost) for cost in step) for step in six.options))
    shared = Program(six, 1, 2 * UNITS, max_depth)
    np.testing.assert_array_equal(shared.times, Program(apart, 1, 2 * UNITS, max_depth).times)
    check_schedules(shared, six)


@pytest.mark.parametrize("max_depth", [None, 2])
@cases(80)
@given(tables(steps=(1, 4), most=2), st.integers(0, 3), st.integers(1, 12), st.integers(12, UNITS))
def test_ends_that_are_not_looked_at_are_not_missed(
    max_depth: int | None, table: CostTable, before: int, block: int, units: int
) -> None:
    """Against all ends of checkpoints at every memory; some groups in front are of another kind."""
    groups = (12 + before) * table.groups
    options = tuple(tuple(replace(cost) for cost in step) for step in table.options)
    chain = replace(
        table,
        options=options * before + table.options * 12,
        step_reads=table.step_reads * (12 + before),
        groups=tuple(range(at, at + len(g)) for g, at in zip(groups, starts(groups), strict=True)),
    )

    def minimum(_: Race, size: int, segments: Segments, through: Through) -> Times:
        best = through.solve()
        return np.array([min(best[memory], segments.at(memory).min()) for memory in range(size)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.tables.BLOCK", block)
        found = Program(chain, 1, units, max_depth).times
        patch.setattr(Race, "minimum", minimum)
        np.testing.assert_array_equal(found, Program(chain, 1, units, max_depth).times)


@pytest.mark.parametrize("shift", [0, 1, 5, 11])
def test_rows_are_compared_where_they_are_seen(shift: int) -> None:
    """Seen with less memory: the least rise in a block is that between what is read there."""
    size, rng = 37, np.random.default_rng(shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.tables.BLOCK", 4)
        table = TimesTable(2, size, 12)
        for row, infinite in enumerate((3, 6)):
            times = np.sort(rng.random(size))[::-1] + row
            times[:infinite] = np.inf
            table.fill(row, times, row - 1, shift)
        blocks = np.arange(table.blocks[0])
        now, before = (table.at(np.full(len(blocks), row), blocks, shift) for row in (1, 0))
        found = table.risen(np.ones(1, np.int64), np.zeros(1, np.int64), shift)
    with np.errstate(invalid="ignore"):
        expected = np.fmin.reduce(now - before, axis=1, initial=np.inf)
    np.testing.assert_array_equal(np.broadcast_to(found, (1, len(blocks)))[0], expected)


def test_the_way_through_is_looked_at_again_when_ends_get_later() -> None:
    twice, after = TimesTable(2, 4, 0), TimesTable(2, 4, 0)
    for row, seconds in enumerate((10.0, 15.0)):
        twice.fill(row, np.full(4, seconds), row - 1)
        after.fill(row, np.zeros(4), row - 1)
    race, none = Race(1, after.blocks), np.zeros(1, np.int64)

    def minimum(row: int) -> Times:
        segments = Segments(range(1), none, twice, none + row, after, none)
        return race.minimum(4, segments, Through("steps", after, row, lambda: np.full(4, 11.0)))

    np.testing.assert_array_equal(minimum(0), 10.0)
    np.testing.assert_array_equal(minimum(1), 11.0)


def starts(groups: tuple[range, ...]) -> list[int]:
    """Where groups of those lengths start, one after another."""
    return [0, *accumulate(len(group) for group in groups)][:-1]


def longest_checkpoint(part: Sequence | Checkpoint | Run) -> int:
    """Steps of the longest checkpoint in a schedule."""
    if isinstance(part, Run):
        return 0
    inside = part.parts if isinstance(part, Sequence) else (part.body,)
    own = len(part.span) if isinstance(part, Checkpoint) else 0
    return max(own, *(longest_checkpoint(inner) for inner in inside))


@cases(60)
@given(tables(steps=(1, 3), most=2), st.integers(1, 5), st.sampled_from([None, 1, 2]))
def test_checkpoints_may_be_limited_in_length(table: CostTable, longest: int, max_depth: int | None) -> None:
    """Cut in pieces they take no more time, and a state more memory for each cut."""
    chain = stacked(replace(table, groups=(range(len(table.options)),)), 12)
    limited = Program(chain, 1, 3 * UNITS, max_depth, longest=longest)
    free = Program(chain, 1, 3 * UNITS, max_depth).times
    assert np.all(limited.times >= free)
    cuts = (12 // longest) * sum(table.state_bytes.values())
    assert np.all(limited.times[cuts:] <= free[: len(free) - cuts])
    check_schedules(limited, chain)
    for memory in np.flatnonzero(np.isfinite(limited.times))[::17]:
        schedule = Reader(limited).schedule(int(memory))
        assert longest_checkpoint(schedule) <= longest * len(table.options)


@contextmanager
def ways_everywhere() -> Iterator[None]:
    """Whole groups are rounded once in short chains as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.dp.MANY", 0)
        yield


@cases(150)
@given(tables(), st.sampled_from([None, 0, 1]))
def test_ways_through_a_group_are_as_good_as_its_steps(table: CostTable, max_depth: int | None) -> None:
    with ways_everywhere():
        check_optimum(table, max_depth)


@cases(150)
@given(tables(steps=(2, 4), most=3), st.integers(2, 7), st.integers(1, 6), st.sampled_from([None, 0, 1, 2]))
def test_rounding_groups_once_keeps_budgets_and_wastes_less(
    table: CostTable, unit: int, times: int, max_depth: int | None
) -> None:
    chain, units = stacked(replace(table, groups=(range(len(table.options)),)), times), -(-250 // unit)
    by_parts = Program(chain, unit, units, max_depth).times
    exact = Program(chain, 1, unit * units, max_depth).times
    with ways_everywhere():
        program = Program(chain, unit, units, max_depth)
        assert np.all(program.times <= by_parts)
        assert np.all(program.times >= exact[::unit])
        check_schedules(program, chain)
        bound = Program(chain, unit, units, max_depth, optimistic=True).times
    below = Program(chain, unit, units, max_depth, optimistic=True).times
    assert np.all(below <= bound)
    assert np.all(np.repeat(bound, unit)[: len(exact)] <= exact)


@cases(1)
@given(tables())
def test_a_dropped_program_frees_its_tables(table: CostTable) -> None:
    """At once, not when the garbage collector comes by: tables are large."""
    program = Program(table, 1, UNITS)
    reader = Reader(program)
    reader.schedule(program.size - 1)
    gone = weakref.ref(program)
    gc.disable()
    try:
        del program, reader
        assert gone() is None
    finally:
        gc.enable()
