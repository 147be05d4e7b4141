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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cost_model.costs import CostTable
from model.strategy import Strategy
from planner.schedule import Checkpoint, Run, Sequence
from planner.solvers.grid import GridCosts, Pass, Times

Depth = int | None  # how many checkpoints may still nest; None for any number
Parts = list[Run | Checkpoint]


@dataclass(frozen=True)
class _Choice:
    """One term of the minimum: seconds + then(M - preserved) + sum(addends(M)), for M >= need.

    Attributes:
        stop: the position it leads to.
        strategy: of the recorded step; None for a checkpoint.
    """

    need: int
    preserved: int
    seconds: float
    then: Times
    stop: int
    strategy: Strategy | None = None
    addends: tuple[Times, ...] = ()

    def relax(self, best: Times) -> None:
        """Lower `best` wherever this choice is faster."""
        size = len(best)
        if self.need >= size:
            return
        times = self.then[self.need - self.preserved : size - self.preserved] + self.seconds
        for addend in self.addends:
            times += addend[self.need :]
        np.minimum(best[self.need :], times, out=best[self.need :])

    def at(self, memory: int) -> float:
        """Its time with that much memory left."""
        if memory < self.need:
            return np.inf
        return self.then[memory - self.preserved] + self.seconds + sum(a[memory] for a in self.addends)


class Program:
    """The recurrence on one grid: all budgets of up to `units * unit_bytes`.

    Args:
        table: costs of the chain; equal steps share their options by identity.
        unit_bytes: size of a grid step.
        units: the largest budget, in grid steps.
        max_depth: how deep checkpoints may nest; None for any depth.
    """

    def __init__(self, table: CostTable, unit_bytes: int, units: int, max_depth: Depth = None) -> None:
        self.table, self.unit_bytes, self.size, self.max_depth = table, unit_bytes, units + 1, max_depth
        self.costs = GridCosts(table, unit_bytes, self.size)
        self._redo: dict[tuple, Times] = {}
        for depth in [None] if max_depth is None else range(max_depth):
            self._solve_redo(depth)
        self._first = self._solve_first()

    @property
    def times(self) -> Times:
        """Least seconds of the whole chain, by budget in grid units."""
        return self._first[0]

    # The recurrence inside one group. A redo that ends with the group has nothing `after` it.

    def _choices(
        self, group: int, at: int, stop: int, after: list[Times], which: Pass, ends: bool, depth: Depth
    ) -> Iterator[_Choice]:
        """What step `at` of a group may do; `after[j]` is what follows position j."""
        costs, steps = self.costs, self.table.groups[group]
        for row in costs.recorded(steps[at], which, ends and at == stop - 1):
            yield _Choice(row.need, row.preserved, row.seconds, after[at + 1], at + 1, row.strategy)
        if depth == 0:
            return
        # A checkpoint over all that is left of a redo would only run it again: the redo starts there.
        for end in range(at + 1, stop if ends else stop + 1):
            kept = costs.exit(steps[at:end], which)
            discard = costs.discard_pass(group, at, end, False, which)
            redo = self._inside(group, end, _below(depth))[at]
            yield _Choice(kept, kept, 0.0, after[end], end, addends=(discard, redo))

    def _through(
        self, group: int, stop: int, after: Times, which: Pass, ends: bool, depth: Depth
    ) -> list[Times]:
        """Least times from each position of a group up to `stop`."""
        times = [after] * (stop + 1)
        for at in reversed(range(stop)):
            times[at] = np.full(self.size, np.inf)
            for choice in self._choices(group, at, stop, times, which, ends, depth):
                choice.relax(times[at])
        return times

    def _inside(self, group: int, stop: int, depth: Depth) -> list[Times]:
        """redo(i, stop) for every position i of one group."""
        return self.costs.cached(
            ("inside", self.costs.kinds[group], stop, depth),
            lambda: self._through(group, stop, np.zeros(self.size), Pass.REDO, True, depth),
        )

    # The recurrence over groups.

    def _checkpoints(
        self, group: int, last: int, after: Callable[[int], Times], which: Pass, depth: Depth
    ) -> Iterator[_Choice]:
        """Checkpoints over whole groups, from `group` to each end up to `last`."""
        if depth == 0:
            return
        groups = self.table.groups
        discard = np.zeros(self.size)
        for end in range(group + 1, last + 1):
            steps = groups[end - 1]
            discard = discard + self.costs.discard_pass(end - 1, 0, len(steps), end > group + 1, which)
            kept = self.costs.exit(range(groups[group].start, steps.stop), which)
            redo = self._redo_of(group, end, _below(depth))
            yield _Choice(kept, kept, 0.0, after(end), end, addends=(discard, redo))

    def _redo_checkpoints(self, group: int, end: int, depth: Depth) -> Iterator[_Choice]:
        return self._checkpoints(
            group, end - 1, lambda stop: self._redo_of(stop, end, depth), Pass.REDO, depth
        )

    def _first_checkpoints(self, group: int) -> Iterator[_Choice]:
        last = len(self.table.groups)
        return self._checkpoints(group, last, self._first.__getitem__, Pass.FIRST, self.max_depth)

    def _redo_of(self, group: int, end: int, depth: Depth) -> Times:
        return self._redo[self._redo_key(group, end, depth)]

    def _redo_key(self, group: int, end: int, depth: Depth) -> tuple:
        runs = groupby(self.costs.kinds[group:end])
        return tuple((kind, len(list(same))) for kind, same in runs), depth

    def _solve_redo(self, depth: Depth) -> None:
        for end in range(1, len(self.table.groups) + 1):
            for group in reversed(range(end)):
                key = self._redo_key(group, end, depth)
                if key not in self._redo:
                    self._redo[key] = self._redo_from(group, end, depth)

    def _redo_from(self, group: int, end: int, depth: Depth) -> Times:
        size = len(self.table.groups[group])
        if end == group + 1:
            return self._inside(group, size, depth)[0]
        after = self._redo_of(group + 1, end, depth)
        best = self._through(group, size, after, Pass.REDO, False, depth)[0]
        for choice in self._redo_checkpoints(group, end, depth):
            choice.relax(best)
        return best

    def _solve_first(self) -> list[Times]:
        groups = self.table.groups
        done = np.full(self.size, np.inf)
        done[self.costs.units(self.table.loss_bytes) :] = 0.0
        self._first = [done] * (len(groups) + 1)
        for group in reversed(range(len(groups))):
            after, size = self._first[group + 1], len(groups[group])
            best = self._through(group, size, after, Pass.FIRST, False, self.max_depth)[0]
            for choice in self._first_checkpoints(group):
                choice.relax(best)
            self._first[group] = best
        return self._first

    # Reading a schedule off the tables: the same choices, compared at one point.

    def schedule(self, memory: int) -> Sequence:
        """The fastest schedule within `memory` grid units, where `times` is finite."""
        parts: Parts = []
        group, groups = 0, self.table.groups
        while group < len(groups):
            group, memory = self._take(
                parts, group, memory, self._first[group + 1], self._first_checkpoints(group), Pass.FIRST,
                self.max_depth,
            )  # fmt: skip
        return Sequence(tuple(parts))

    def _redo_body(self, group: int, end: int, memory: int, depth: Depth) -> Sequence:
        parts: Parts = []
        while group < end - 1:
            checkpoints = self._redo_checkpoints(group, end, depth)
            after = self._redo_of(group + 1, end, depth)
            group, memory = self._take(parts, group, memory, after, checkpoints, Pass.REDO, depth)
        if group < end:
            size = len(self.table.groups[group])
            table = self._inside(group, size, depth)
            self._walk(parts, group, 0, size, memory, table, Pass.REDO, True, depth)
        return Sequence(tuple(parts))

    def _take(
        self,
        parts: Parts,
        group: int,
        memory: int,
        after: Times,
        checkpoints: Iterator[_Choice],
        which: Pass,
        depth: Depth,
    ) -> tuple[int, int]:
        """Append the best way on from a group; returns the next group and the memory left there."""
        size = len(self.table.groups[group])
        times = self._through(group, size, after, which, False, depth)
        best = min(checkpoints, key=lambda choice: choice.at(memory), default=None)
        if best is None or times[0][memory] <= best.at(memory):
            memory = self._walk(parts, group, 0, size, memory, times, which, False, depth)
            return group + 1, memory
        body = self._redo_body(group, best.stop, memory, _below(depth))
        parts.append(Checkpoint(body, self.costs.discard_strategies(body.span, memory, which)))
        return best.stop, memory - best.preserved

    def _walk(
        self,
        parts: Parts,
        group: int,
        at: int,
        stop: int,
        memory: int,
        times: list[Times],
        which: Pass,
        ends: bool,
        depth: Depth,
    ) -> int:
        """Append the best way through the steps of one group; returns the memory left after them."""
        steps = self.table.groups[group]
        while at < stop:
            choices = self._choices(group, at, stop, times, which, ends, depth)
            best = min(choices, key=lambda choice: choice.at(memory))
            if best.strategy is not None:
                parts.append(Run(steps[at], best.strategy))
            else:
                body: Parts = []
                table = self._inside(group, best.stop, _below(depth))
                self._walk(body, group, at, best.stop, memory, table, Pass.REDO, True, _below(depth))
                discard = self.costs.discard_strategies(steps[at : best.stop], memory, which)
                parts.append(Checkpoint(Sequence(tuple(body)), discard))
            at, memory = best.stop, memory - best.preserved
        return memory


def _below(depth: Depth) -> Depth:
    return None if depth is None else depth - 1
