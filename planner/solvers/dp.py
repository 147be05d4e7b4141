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

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cost_model.costs import CostTable
from model.strategy import Strategy
from planner.schedule import Checkpoint, Run, Sequence
from planner.solvers.grid import FIRST, GridCosts, Pass, Times

Depth = int | None  # how many checkpoints may still nest; None for any number
Parts = list[Run | Checkpoint]

SAMPLES = 64  # points of the grid at which checkpoints over many groups are compared first
READ_CACHE = 128  # ways through a group that are kept while schedules are read off


@dataclass(frozen=True)
class _Choice:
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
        return then[memory - self.preserved] + addend


@dataclass(frozen=True)
class _Segments:
    """Checkpoints over whole groups from one group on, a row for each end.

    The k-th costs sum(passes[: k + 1]) + redo[redo_rows[k]] + after[after_rows[k]](M - kept[k]).
    """

    ends: range
    passes: list[Times]
    kept: NDArray[np.int64]
    redo: NDArray[np.float64]
    redo_rows: NDArray[np.int64]
    after: NDArray[np.float64]
    after_rows: NDArray[np.int64]

    def sampled(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """Their times with so much memory left: a row for each end, a column for each point."""
        left = points - self.kept[:, None]
        times = self.after[self.after_rows[:, None], np.maximum(left, 0)]
        times[left < 0] = np.inf
        times += self.redo[self.redo_rows[:, None], points]
        times += np.cumsum([discard[points] for discard in self.passes], axis=0)
        return times

    def relax(self, best: Times, points: NDArray[np.int64]) -> None:
        """Lower `best` wherever one of them is faster.

        Times fall with memory. So between two points a checkpoint that is no faster at the second than
        the best of all is at the first cannot win, and is not looked at.
        """
        sampled = self.sampled(points)
        fastest = sampled.argmin(axis=0)
        bound = np.minimum(best[points], sampled[fastest, np.arange(len(points))])
        wins = sampled[:, 1:] < bound[:-1]
        wins[fastest[:-1], np.arange(len(points) - 1)] = True
        discard, summed = np.zeros_like(best), 0
        for k in np.flatnonzero(wins.any(axis=1)):
            blocks = np.flatnonzero(wins[k])
            start, stop = max(points[blocks[0]], self.kept[k]), points[blocks[-1] + 1]
            stop += stop == len(best) - 1
            if stop <= start:
                continue
            discard, summed = _sum_up(self.passes, discard, summed, int(k) + 1)
            times = discard[start:stop] + self.redo[self.redo_rows[k], start:stop]
            times += self.after[self.after_rows[k], start - self.kept[k] : stop - self.kept[k]]
            np.minimum(best[start:stop], times, out=best[start:stop])


def _sum_up(passes: list[Times], total: Times, start: int, stop: int) -> tuple[Times, int]:
    """total + sum(passes[start:stop]), and stop; equal neighbours are multiplied."""
    while start < stop:
        end = start + 1
        while end < stop and passes[end] is passes[start]:
            end += 1
        total = total + (end - start) * passes[start]
        start = end
    return total, stop


@dataclass
class Program:
    """The recurrence on one grid: all budgets of up to `units * unit_bytes`.

    Args:
        table: costs of the chain; equal steps share their options by identity.
        unit_bytes: size of a grid step.
        units: the largest budget, in grid steps.
        max_depth: how deep checkpoints may nest; None for any depth.
        optimistic: round costs down: times are lower bounds then, and there are no schedules to read.
    """

    table: CostTable
    unit_bytes: int
    units: int
    max_depth: Depth = None
    optimistic: bool = False
    _read: dict[tuple, list[Times]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.size = self.units + 1
        self.costs = GridCosts(self.table, self.unit_bytes, self.size, self.optimistic)
        self._spare = np.empty(self.size)
        self._points = np.unique(np.linspace(0, self.units, SAMPLES + 1).astype(np.int64))
        count, self._numbers = number_segments(self.costs.kinds)
        depths = [None] if self.max_depth is None else range(self.max_depth)
        self._redo = {depth: np.empty((count, self.size)) for depth in depths}
        for depth in depths:
            self._solve_redo(depth)
        self._first = self._solve_first()

    @property
    def times(self) -> Times:
        """Least seconds of the whole chain, by budget in grid units."""
        return self._first[0]

    # The recurrence inside one group. A redo that ends with the group has nothing `after` it.

    def _choices(
        self, group: int, at: int, stop: int, which: Pass, ends: bool, depth: Depth
    ) -> list[_Choice]:
        """What step `at` of a group may do on the way to position `stop`."""
        costs, steps = self.costs, self.table.groups[group]

        def make() -> list[_Choice]:
            choices = [
                _Choice(row.need, row.preserved, row.seconds, at + 1, row.strategy)
                for row in costs.recorded(steps[at], which, ends and at == stop - 1)
            ]
            if depth == 0:
                return choices
            # A checkpoint over all that is left of a redo would only run it again: the redo starts there.
            for end in range(at + 1, stop if ends else stop + 1):
                kept = costs.exit(steps[at:end], which)
                discard = costs.discard_pass(group, at, end, frozenset(), which)
                redo = self._inside(group, end, _below(depth))[at]
                choices.append(_Choice(kept, kept, 0.0, end, addend=discard + redo))
            return choices

        outputs = () if which.redo else costs.outputs_of(group)
        return costs.cached(("choices", costs.kinds[group], at, stop, which, ends, depth, outputs), make)

    def _through(
        self, group: int, stop: int, after: Times, which: Pass, ends: bool, depth: Depth
    ) -> list[Times]:
        """Least times from each position of a group up to `stop`; `after` is what follows."""
        times = [after] * (stop + 1)
        for at in reversed(range(stop)):
            times[at] = np.full(self.size, np.inf)
            for choice in self._choices(group, at, stop, which, ends, depth):
                choice.relax(times[at], times[choice.stop], self._spare)
        return times

    def _inside(self, group: int, stop: int, depth: Depth) -> list[Times]:
        """redo(i, stop) for every position i of one group."""
        return self.costs.cached(
            ("inside", self.costs.kinds[group], stop, depth),
            lambda: self._through(
                group, stop, np.zeros(self.size), self._redo_pass(group, stop), True, depth
            ),
        )

    def _redo_pass(self, group: int, stop: int) -> Pass:
        """A redo that ends at a position of a group."""
        return self.costs.redo(self.table.groups[group].start + stop)

    # The recurrence over groups.

    def _segments(
        self,
        group: int,
        last: int,
        which: Pass,
        depth: Depth,
        after: NDArray[np.float64],
        row: Callable[[int], int],
    ) -> _Segments:
        """Checkpoints over whole groups, from `group` to each end up to `last`.

        Args:
            after, row: what follows each end, as a row of a table.
        """
        groups, costs, targets = self.table.groups, self.costs, self.table.targets
        ends = range(group + 1, last + 1)
        passes, made = [], frozenset[str]()
        for end in ends:
            steps = groups[end - 1]
            passes.append(costs.discard_pass(end - 1, 0, len(steps), made, which))
            if len(made) < len(self.table.state_bytes):
                made = made.union(targets[step] for step in steps)
        kept = [costs.exit(range(groups[group].start, groups[end - 1].stop), which) for end in ends]
        return _Segments(
            ends,
            passes,
            np.array(kept, np.int64),
            self._redo[_below(depth)],
            np.array([self._numbers[end][group] for end in ends], np.int64),
            after,
            np.array([row(end) for end in ends], np.int64),
        )

    def _redo_segments(self, group: int, end: int, depth: Depth) -> _Segments | None:
        if depth == 0 or end == group + 1:
            return None
        which, numbers = self.costs.redo(self.table.groups[end - 1].stop), self._numbers[end]
        return self._segments(group, end - 1, which, depth, self._redo[depth], numbers.__getitem__)

    def _first_segments(self, group: int) -> _Segments | None:
        if self.max_depth == 0:
            return None
        last = len(self.table.groups)
        return self._segments(group, last, FIRST, self.max_depth, self._first, lambda end: end)

    def _redo_of(self, group: int, end: int, depth: Depth) -> Times:
        return self._redo[depth][self._numbers[end][group]]

    def _solve_redo(self, depth: Depth) -> None:
        done: set[int] = set()
        for end in range(1, len(self.table.groups) + 1):
            for group in reversed(range(end)):
                number = self._numbers[end][group]
                if number not in done:
                    self._redo[depth][number] = self._redo_from(group, end, depth)
                    done.add(number)

    def _redo_from(self, group: int, end: int, depth: Depth) -> Times:
        size = len(self.table.groups[group])
        if end == group + 1:
            return self._inside(group, size, depth)[0]
        after = self._redo_of(group + 1, end, depth)
        which = self.costs.redo(self.table.groups[end - 1].stop)
        best = self._through(group, size, after, which, False, depth)[0]
        segments = self._redo_segments(group, end, depth)
        if segments is not None:
            segments.relax(best, self._points)
        return best

    def _solve_first(self) -> NDArray[np.float64]:
        groups = self.table.groups
        self._first = np.full((len(groups) + 1, self.size), np.inf)
        self._first[-1, self.costs.units(self.table.loss_bytes) :] = 0.0
        for group in reversed(range(len(groups))):
            after, size = self._first[group + 1], len(groups[group])
            best = self._through(group, size, after, FIRST, False, self.max_depth)[0]
            segments = self._first_segments(group)
            if segments is not None:
                segments.relax(best, self._points)
            self._first[group] = best
        return self._first

    # Reading a schedule off the tables: the same choices, compared at one point.

    def schedule(self, memory: int) -> Sequence:
        """The fastest schedule within `memory` grid units, where `times` is finite."""
        parts: Parts = []
        group, groups = 0, self.table.groups
        while group < len(groups):
            group, memory = self._take(
                parts, group, memory, self._first[group + 1], self._first_segments(group), FIRST,
                self.max_depth,
            )  # fmt: skip
        return Sequence(tuple(parts))

    def _redo_body(self, group: int, end: int, memory: int, depth: Depth) -> Sequence:
        parts: Parts = []
        which = self.costs.redo(self.table.groups[end - 1].stop)
        while group < end - 1:
            segments, after = self._redo_segments(group, end, depth), self._redo_of(group + 1, end, depth)
            group, memory = self._take(parts, group, memory, after, segments, which, depth)
        if group < end:
            size = len(self.table.groups[group])
            table = self._inside(group, size, depth)
            self._walk(parts, group, 0, size, memory, table, which, True, depth)
        return Sequence(tuple(parts))

    def _take(
        self,
        parts: Parts,
        group: int,
        memory: int,
        after: Times,
        segments: _Segments | None,
        which: Pass,
        depth: Depth,
    ) -> tuple[int, int]:
        """Append the best way on from a group; returns the next group and the memory left there."""
        size = len(self.table.groups[group])
        times = self._read_through(group, after, which, depth)
        if segments is not None:
            spans = segments.sampled(np.array([memory]))[:, 0]
            best = int(spans.argmin())
            if spans[best] < times[0][memory]:
                end = segments.ends[best]
                body = self._redo_body(group, end, memory, _below(depth))
                parts.append(Checkpoint(body, self.costs.discard_strategies(body.span, memory, which)))
                return end, memory - int(segments.kept[best])
        memory = self._walk(parts, group, 0, size, memory, times, which, False, depth)
        return group + 1, memory

    def _read_through(self, group: int, after: Times, which: Pass, depth: Depth) -> list[Times]:
        """`_through` for a whole group; neighbouring budgets ask for the same ones."""
        outputs = () if which.redo else self.costs.outputs_of(group)
        key = self.costs.kinds[group], after.__array_interface__["data"][0], which, depth, outputs
        if key not in self._read:
            if len(self._read) == READ_CACHE:
                del self._read[next(iter(self._read))]
            size = len(self.table.groups[group])
            self._read[key] = self._through(group, size, after, which, False, depth)
        return self._read[key]

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
        steps, costs, below = self.table.groups[group], self.costs, _below(depth)
        while at < stop:
            choices = self._choices(group, at, stop, which, ends, depth)
            best = min(choices, key=lambda choice: choice.at(memory, times[choice.stop]))
            if best.strategy is not None:
                parts.append(Run(steps[at], best.strategy))
            else:
                body: Parts = []
                table, redo = self._inside(group, best.stop, below), self._redo_pass(group, best.stop)
                self._walk(body, group, at, best.stop, memory, table, redo, True, below)
                discard = costs.discard_strategies(steps[at : best.stop], memory, which)
                parts.append(Checkpoint(Sequence(tuple(body)), discard))
            at, memory = best.stop, memory - best.preserved
        return memory


def _below(depth: Depth) -> Depth:
    return None if depth is None else depth - 1


def number_segments(kinds: list[int]) -> tuple[int, list[list[int]]]:
    """How many different runs of groups there are, and for each end and start the run's number."""
    numbers: dict[tuple[int, int], int] = {}
    ends = []
    for end in range(len(kinds) + 1):
        starts = [-1] * (end + 1)
        for group in reversed(range(end)):
            starts[group] = numbers.setdefault((kinds[group], starts[group + 1]), len(numbers))
        ends.append(starts)
    return len(numbers), ends
