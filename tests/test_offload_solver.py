"""Host memory in training, planned as by exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoplan.cost_model.costs import CostTable
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.schedules.offload import has_record, last_read, waiting_bytes
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.frontier import Frontier, InfeasibleError
from evoplan.planner.solvers.offload import OffloadProgram
from evoplan.planner.solvers.offload_frontier import OffloadFrontier, offload_bound
from tests.brute_force import schedules
from tests.offload import CONFIG, asked
from tests.test_dp import UNITS, cases, tables

# --- the solver ---------------------------------------------------------------------------------


def charged(schedule: Sequence, table: CostTable) -> tuple[int, float]:
    """Peak without outputs and seconds, as the program charges them; nothing here is taken from it."""
    costs = [{cost.strategy: cost for cost in options} for options in table.options]
    last = {name: step for step, names in enumerate(table.makes) for name in names}
    gradients, peaks = sum(table.state_bytes.values()), [0]

    def size(names: Any) -> int:
        return sum(table.state_bytes[name] for name in names)

    def discarding(part: Checkpoint, held: int) -> float:
        made: set[str] = set()
        for step, strategy in zip(part.span, part.discard, strict=True):
            peaks.append(held + size(made) + costs[step][strategy].discard_bytes)
            made |= set(table.makes[step])
        return sum(
            costs[s][strategy].discard_seconds for s, strategy in zip(part.span, part.discard, strict=True)
        )

    def exits(span: range, redo: bool) -> int:
        made = {name: step for step in span for name in table.makes[step]}
        return size(name for name, step in made.items() if redo or last[name] != step)

    def redo(body: Sequence, held: int) -> float:
        seconds = 0.0
        for number, part in enumerate(body.parts):
            ends = number == len(body.parts) - 1
            if isinstance(part, Checkpoint):
                seconds += 0.0 if ends else discarding(part, held + gradients)
                seconds += redo(part.body, held)
                held += 0 if ends else exits(part.span, True)
                continue
            cost = costs[part.step][part.strategy]
            peaks.append(held + cost.backward_bytes)
            seconds += cost.backward_seconds
            run = cost.ending if ends else cost.forward
            if run is not None:
                peaks.append(held + gradients + run.bytes)
                seconds += run.seconds
                held += cost.preserved_bytes + size(table.makes[part.step])
        return seconds

    held = leaves = 0
    total = 0.0
    sizes = waiting_bytes(schedule, table)
    for part, waits in zip(schedule.parts, sizes, strict=True):
        if isinstance(part, Checkpoint):
            forward = discarding(part, held + leaves)
            backward = redo(part.body, held + leaves)
            kept = exits(part.span, False)
        else:
            cost = costs[part.step][part.strategy]
            output = size(name for name in table.makes[part.step] if last[name] == part.step)
            backward = max(cost.backward(in_graph).bytes for in_graph in (True, False))
            peaks += [held + leaves + backward, held + leaves + cost.forward_bytes - output]
            forward, backward = cost.forward_seconds, cost.backward_seconds
            kept = cost.preserved_bytes + size(table.makes[part.step]) - output
        copy = leaves / table.host_bandwidth
        total += max(forward, copy) + max(backward, copy)
        held, leaves = held + kept - waits, waits
    peaks.append(held + table.loss_bytes)
    return max(peaks), total


def every_discard(schedule: Sequence, table: CostTable) -> Iterator[Sequence]:
    """The schedule with every choice of its discarding strategies."""

    def ways(part: Run | Checkpoint) -> list[Run | Checkpoint]:
        if isinstance(part, Run):
            return [part]
        discards = list(product(*([cost.strategy for cost in table.options[step]] for step in part.span)))
        return [Checkpoint(body, discard) for body in every_discard(part.body, table) for discard in discards]

    yield from map(Sequence, product(*map(ways, schedule.parts)))


def every_wait(schedule: Sequence, table: CostTable) -> Iterator[Sequence]:
    """The schedule with every choice of what waits."""

    def ways(part: Run | Checkpoint) -> list[Run | Checkpoint]:
        may = [version.tensor for version in last_read(table.liveness, part.span)]
        if isinstance(part, Run) and has_record(part.strategy):
            may.append(RECORD)
        subsets = [some for count in range(len(may) + 1) for some in combinations(may, count)]
        return [replace(part, wait=some) for some in subsets]

    *first, last = schedule.parts
    for parts in product(*map(ways, first)):
        yield Sequence((*parts, last))


@cases(40)
@given(tables(steps=(2, 3)), st.sampled_from([0.3, 1.0, 3.0]))
def test_it_finds_the_optimum_of_its_class(table: CostTable, bandwidth: float) -> None:
    table = replace(table, host_bandwidth=bandwidth)
    best = np.full(UNITS + 1, np.inf)
    for bare in schedules(table):
        for discarding in every_discard(bare, table):
            for schedule in every_wait(discarding, table):
                peak, seconds = charged(schedule, table)
                np.minimum(best[peak:], seconds, out=best[peak:])
    program = OffloadProgram(Program(table, 1, UNITS), bandwidth)
    np.testing.assert_allclose(program.times, best, rtol=1e-12)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in np.flatnonzero(np.isfinite(program.times)):
        played = replay(program.schedule(int(memory)), table)
        assert played.peak_bytes <= memory + outputs
        assert played.seconds == pytest.approx(program.times[memory])


@cases(30)
@given(tables(steps=(2, 4)), st.integers(2, 7))
def test_coarse_grids_bound_it_from_both_sides(table: CostTable, unit: int) -> None:
    table = replace(table, host_bandwidth=1.0)
    exact = OffloadProgram(Program(table, 1, UNITS), 1.0).times
    above = OffloadProgram(Program(table, unit, UNITS // unit), 1.0).times
    below = OffloadProgram(Program(table, unit, UNITS // unit, optimistic=True), 1.0).times
    for units in range(UNITS // unit + 1):
        assert below[units] <= exact[units * unit] * (1 + 1e-12)
        assert exact[units * unit] <= above[units] * (1 + 1e-12)


def test_it_is_never_slower_than_without_and_keeps_to_host_memory() -> None:
    costed = cost_problem(asked(config=replace(CONFIG, n_block=4)))
    table, plain = costed.table, Frontier(costed.table)
    found = OffloadFrontier(table, 2**30)
    assert found.least_replay.peak_bytes <= plain.least_replay.peak_bytes
    gained = 0
    for budget in found.budgets(3):
        played = replay(found.schedule(budget), table)
        assert played.peak_bytes <= budget
        assert played.seconds <= plain.seconds(budget) * (1 + 1e-9)
        assert played.seconds >= offload_bound(table, budget) * (1 - 1e-9)
        gained += played.seconds < 0.95 * plain.seconds(budget)
        short = OffloadFrontier(table, max(1, played.host_bytes // 2))
        if played.host_bytes and np.isfinite(plain.seconds(budget)):
            less = replay(short.schedule(budget), table)
            assert less.host_bytes <= played.host_bytes // 2
            assert less.peak_bytes <= budget
            assert played.seconds <= less.seconds * (1 + 1e-9)
    assert gained
    with pytest.raises(InfeasibleError):
        found.schedule(found.least_replay.peak_bytes // 2)


def test_nothing_waits_where_there_is_room() -> None:
    table = cost_problem(asked()).table
    found = OffloadFrontier(table, 2**30)
    room = found.most_bytes + found.output_bytes
    for budget in (room, 2 * room, None):
        assert replay(found.schedule(budget), table).host_bytes == 0
