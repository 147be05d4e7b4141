"""The dynamic program over (inter_mem, preserved_mem, time): every budget in one solve.

With memory M left above everything that is held, the least time for the rest of the chain is a
step function of M alone. So it is an array over a grid of M, and preserving p bytes shifts it by p:

    first(i, M) = min of
      time(k) + first(i+1, M - preserved(k))                    step i recorded under strategy k;
                                                                needs M >= max(forward, backward)
      D(i, j, M) + first(j, M - exit(j)) + redo(i, j, M)        steps i..j under one Checkpoint

`redo(i, j, M)` is the same program for the second run of a segment, where the gradients of the
state are live as well; its own checkpoints nest, each over strictly fewer steps, so one table
holds every depth. D is the least time of a discarding pass. Segments lie inside one block or cover
whole blocks; equal runs of blocks are solved once. Costs are rounded up to the grid, so that a
schedule never exceeds its budget.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.model.running.strategy import Strategy
from evoplan.planner.solvers.grid import FIRST, MANY, GridCosts, Pass, Times
from evoplan.planner.solvers.segments import Race, SegmentCosts, Segments, Through, different_segments
from evoplan.planner.solvers.tables import Integers, TimesTable
from evoplan.planner.solvers.ways import WayFinder, Ways

Depth = int | None  # how many checkpoints may still nest; None for any number


@dataclass(frozen=True)
class Choice:
    """One term of the minimum inside a group: seconds + then(M - preserved) + addend(M), for M >= need.

    Attributes:
        stop: the position it leads to; `then` is the table of that position.
        strategy: of the recorded step; None for a checkpoint.
    """

    need: int
    preserved: int
    seconds: float
    stop: int
    strategy: Strategy | None = None
    addend: Times | None = None

    def relax(self, best: Times, then: Times, spare: Times) -> None:
        """Lower `best` wherever this choice is faster; `spare` is written over."""
        size = len(best)
        if self.need >= size:
            return
        # Times fall with memory: this choice is nowhere faster than at the end.
        least = self.at(size - 1, then)
        stop = size - int(best[::-1].searchsorted(least, side="right"))
        if stop <= self.need:
            return
        times = spare[self.need : stop]
        addend = self.seconds if self.addend is None else self.addend[self.need : stop]
        np.add(then[self.need - self.preserved : stop - self.preserved], addend, out=times)
        np.minimum(best[self.need : stop], times, out=best[self.need : stop])

    def at(self, memory: int, then: Times) -> float:
        """Its time with that much memory left."""
        if memory < self.need:
            return np.inf
        addend = self.seconds if self.addend is None else self.addend[memory]
        return float(then[memory - self.preserved] + addend)


@dataclass
class Program:
    """The recurrence on one grid: all budgets of up to `units * unit_bytes`.

    Args:
        table: costs of the chain; equal steps share their options by identity.
        unit_bytes: size of a grid step.
        units: the largest budget, in grid steps.
        max_depth: how deep checkpoints may nest; None for any depth.
        optimistic: round costs down: times are lower bounds then, and there are no schedules to read.
        longest: how many groups a checkpoint over whole groups may hold; None for any number.
    """

    table: CostTable
    unit_bytes: int
    units: int
    max_depth: Depth = None
    optimistic: bool = False
    longest: int | None = None

    def __post_init__(self) -> None:
        self.size = self.units + 1
        self.costs = GridCosts(self.table, self.unit_bytes, self.size, self.optimistic)
        self._spare = np.empty(self.size)
        self.over_groups, self._way_finder = SegmentCosts(self.costs), WayFinder(self.costs)
        self._runs, self._numbers = different_segments(tuple(self.costs.kinds))
        most = sum(self.costs.units(size) for size in self.table.state_bytes.values())  # of what is kept

        def times_table(rows: int) -> TimesTable:
            return TimesTable(rows, self.size, most)

        groups, count = self.table.groups, len(self._runs)
        depths = [None] if self.max_depth is None else range(self.max_depth)
        passes = {FIRST, *(self.costs.redo(group.stop) for group in groups)}
        self._redo = {depth: times_table(count) for depth in depths}
        # A discarding pass and a redo together, by the pass that they are part of.
        self._twice = {(depth, which): times_table(count) for depth in depths for which in passes}
        self._first = times_table(len(groups) + 1)
        for depth in depths:
            self._solve_redo(depth)
        self._solve_first()

    @property
    def times(self) -> Times:
        """Least seconds of the whole chain, by budget in grid units."""
        return self._first.row(0)

    @property
    def nbytes(self) -> int:
        """Size of its tables."""
        return sum(table.nbytes for table in (self._first, *self._redo.values(), *self._twice.values()))

    # The recurrence inside one group. A redo that ends with the group has nothing `after` it.

    def choices(self, group: int, at: int, stop: int, which: Pass, ends: bool, depth: Depth) -> list[Choice]:
        """What step `at` of a group may do on the way to position `stop`."""
        costs, steps = self.costs, self.table.groups[group]

        def make() -> list[Choice]:
            choices = [
                Choice(row.need, row.preserved, row.seconds, at + 1, row.strategy)
                for row in costs.recorded(steps[at], which, ends and at == stop - 1)
            ]
            if depth == 0:
                return choices
            # A checkpoint over all that is left of a redo would only run it again: the redo starts there.
            for end in range(at + 1, stop if ends else stop + 1):
                kept = costs.exit(steps[at:end], which)
                discard = costs.discard_pass(group, at, end, frozenset(), which)
                redo = self.inside(group, end, self.below(depth))[at]
                choices.append(Choice(kept, kept, 0.0, end, addend=discard + redo))
            return choices

        outputs = () if which.redo else costs.outputs_of(group)
        return costs.cached(("choices", costs.kinds[group], at, stop, which, ends, depth, outputs), make)

    def through(
        self, group: int, stop: int, after: Times, which: Pass, ends: bool, depth: Depth
    ) -> list[Times]:
        """Least times from each position of a group up to `stop`; `after` is what follows."""
        times = [after] * (stop + 1)
        for at in reversed(range(stop)):
            times[at] = np.full(len(after), np.inf)
            for choice in self.choices(group, at, stop, which, ends, depth):
                choice.relax(times[at], times[choice.stop], self._spare)
        return times

    def ways(self, group: int, which: Pass, depth: Depth) -> Ways | None:
        """Ways through a whole group where memory is plenty; None where they are not used."""

        def make() -> Ways | None:
            size = len(self.table.groups[group])
            choices = [self.choices(group, at, size, which, False, depth) for at in range(size)]
            checkpoints = {
                (at, choice.stop): choice.addend
                for at in range(size)
                for choice in choices[at]
                if choice.addend is not None
            }
            ways = self._way_finder.find(group, which, checkpoints)
            few = len(ways.ways) <= sum(len(some) for some in choices) and ways.enough < self.size
            return ways if few else None

        if len(self.table.groups) <= MANY:
            return None
        outputs = () if which.redo else self.costs.outputs_of(group)
        return self.costs.cached(("ways", self.costs.kinds[group], which, depth, outputs), make)

    def through_all(self, group: int, after: Times, which: Pass, depth: Depth) -> Times:
        """Least times through a whole group."""
        size, ways = len(self.table.groups[group]), self.ways(group, which, depth)
        if ways is None:
            return self.through(group, size, after, which, False, depth)[0]
        low = self.through(group, size, after[: ways.enough], which, False, depth)[0]
        return np.concatenate([low, np.minimum(ways.through(after), low[-1])])

    def inside(self, group: int, stop: int, depth: Depth) -> list[Times]:
        """redo(i, stop) for every position i of one group."""
        return self.costs.cached(
            ("inside", self.costs.kinds[group], stop, depth),
            lambda: self.through(group, stop, np.zeros(self.size), self.redo_pass(group, stop), True, depth),
        )

    def redo_pass(self, group: int, stop: int) -> Pass:
        """A redo that ends at a position of a group."""
        return self.costs.redo(self.table.groups[group].start + stop)

    # The recurrence over groups.

    def redo_segments(self, group: int, end: int, depth: Depth) -> Segments | None:
        """Checkpoints from `group` on, within a redo that ends before group `end`."""
        if depth == 0 or end == group + 1:
            return None
        which = self.costs.redo(self.table.groups[end - 1].stop)
        last = self._last_end(group, end - 1)
        after_rows = self._numbers[group + 1 : last + 1, end]
        return self._segments(group, last, which, depth, self._redo[depth], after_rows)

    def first_segments(self, group: int) -> Segments | None:
        """Checkpoints from `group` on, on the first pass."""
        if self.max_depth == 0:
            return None
        last = self._last_end(group, len(self.table.groups))
        return self._segments(group, last, FIRST, self.max_depth, self._first, np.arange(group + 1, last + 1))

    def _segments(
        self, group: int, last: int, which: Pass, depth: Depth, after: TimesTable, after_rows: Integers
    ) -> Segments:
        return Segments(
            range(group + 1, last + 1),
            self.over_groups.kept(group, last, which),
            self._twice[self.below(depth), which],
            self._numbers[group, group + 1 : last + 1],
            after,
            after_rows,
        )

    def _last_end(self, group: int, last: int) -> int:
        return last if self.longest is None else min(last, group + self.longest)

    @staticmethod
    def below(depth: Depth) -> Depth:
        """How many checkpoints may nest inside one that may be nested so deep."""
        return None if depth is None else depth - 1

    def first_of(self, group: int) -> Times:
        """Least times of the first pass from a group on."""
        return self._first.row(group)

    def redo_of(self, group: int, end: int, depth: Depth) -> Times:
        """Least times of a redo of whole groups."""
        return self._redo[depth].row(int(self._numbers[group, end]))

    def _solve_redo(self, depth: Depth) -> None:
        races: dict[int, Race] = defaultdict(
            self._race
        )  # by first group: the ends of its redo follow each other
        for group, end in self._runs:
            if self._last_end(group, end) < end:
                continue
            self._fill_redo(group, end, depth, self._redo_from(group, end, depth, races[group]))

    def _fill_redo(self, group: int, end: int, depth: Depth, times: Times) -> None:
        """Set what a redo takes, and its discarding pass and itself together.

        Rows are compared with those that the next minimum had in their place: a redo that ends one group
        before, a checkpoint that begins one group later.
        """
        number = self._numbers[group, end]
        entry = self.costs.state_units(self.costs.liveness.alive(self.table.groups[group].start))
        self._redo[depth].fill(number, times, self._numbers[group, end - 1], entry)
        for (level, which), table in self._twice.items():
            if level == depth:
                discard = self.over_groups.discard_pass(group, end, which)
                table.fill(number, times + discard, self._numbers[group + 1, end])

    def _race(self) -> Race:
        return Race(len(self.table.groups) + 1, self._first.blocks)

    def _redo_from(self, group: int, end: int, depth: Depth, race: Race) -> Times:
        if end == group + 1:
            return self.inside(group, len(self.table.groups[group]), depth)[0]
        which, row = self.costs.redo(self.table.groups[end - 1].stop), int(self._numbers[group + 1, end])
        way = self._way(group, self._redo[depth], row, which, depth)
        segments = self.redo_segments(group, end, depth)
        return way.solve() if segments is None else race.minimum(self.size, segments, way)

    def _way(self, group: int, after: TimesTable, row: int, which: Pass, depth: Depth) -> Through:
        """Through all steps of a group, to a row of what follows."""
        outputs = () if which.redo else self.costs.outputs_of(group)
        steps = self.costs.kinds[group], which, outputs, depth
        return Through(steps, after, row, lambda: self.through_all(group, after.row(row), which, depth))

    def _solve_first(self) -> None:
        groups = self.table.groups
        done = np.full(self.size, np.inf)
        done[self.costs.units(self.table.loss_bytes) :] = 0.0
        self._first.fill(len(groups), done)
        race = self._race()
        for group in reversed(range(len(groups))):
            way = self._way(group, self._first, group + 1, FIRST, self.max_depth)
            segments = self.first_segments(group)
            times = way.solve() if segments is None else race.minimum(self.size, segments, way)
            self._first.fill(group, times, group + 1)
