"""Checkpoints over whole groups: the part of the recurrence that is quadratic in the chain's length.

Of the many ends that a checkpoint may have, few can be best at any memory, and from one minimum to the
next they hardly change. So it is remembered how far behind the best each end was, in each block of the
grid. What it is made of, and the best, have become later by no less and no more than so much; an end that
is still behind by that account is not looked at. Nothing is lost by it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from evoplan.planner.solvers.grid import GridCosts, Pass, Times
from evoplan.planner.solvers.tables import Integers, TimesTable

# Of the largest time: more than the rounding errors of thousands of additions.
TOLERANCE = 2.0**-36
AT_ONCE = 256  # ends and blocks that are evaluated together: what fits into a processor's cache


@dataclass(frozen=True)
class Segments:
    """Checkpoints over whole groups from one group on, a row for each end.

    The k-th costs twice[twice_rows[k]](M) + after[after_rows[k]](M - kept[k]): its two runs, and the rest.
    """

    ends: range
    kept: Integers
    twice: TimesTable
    twice_rows: Integers
    after: TimesTable
    after_rows: Integers

    def at(self, memory: int) -> Times:
        """The time of each with so much memory left."""
        left = memory - self.kept
        times: Times = np.where(left < 0, np.inf, self.after.rows[self.after_rows, np.maximum(left, 0)])
        times += self.twice.rows[self.twice_rows, memory]
        return times


@dataclass(frozen=True)
class Through:
    """The way on without such a checkpoint: through the steps of one group.

    Attributes:
        steps: equal where these steps may do the same.
        after, row: least times of what follows.
        solve: finds the least times.
    """

    steps: Hashable
    after: TimesTable
    row: int
    solve: Callable[[], Times]


class Race:
    """One minimum after another, each over ends and a way through, where all are made of what they were
    made of before, or later.

    Args:
        ends: how many there are at most.
        blocks: how many the grid has, and the points of one.
    """

    def __init__(self, ends: int, blocks: tuple[int, int]) -> None:
        self._made_of = np.full((3, ends), -1)  # row of the two runs, row of the rest, what is kept
        self._behind = np.full((ends, blocks[0]), -np.inf)  # at least; beside the best of the last minimum
        self._passed: tuple[Hashable, int] = None, -1  # steps of the last way through, row of what followed
        self._passing = np.full(blocks[0], -np.inf)  # by how much it was behind, at least
        self._best = np.full(blocks, np.inf)

    def minimum(self, size: int, segments: Segments, through: Through) -> Times:
        """The least times over all ends and the way through, at `size` points of the grid."""
        best = np.full(self._best.shape, np.inf)
        ends = slice(segments.ends.start, segments.ends.stop)
        first = self._behind[ends] <= 0  # the fastest of the last time, and new ends
        with np.errstate(invalid="ignore"):  # infinite less infinite: not a number, which bounds nothing
            passing, passed = self._passing_bounds(through), None
            if not (self._passing > 0).all():  # where it was fastest, it is looked at first
                passed = self._pass(through, best)
            behind = self._bounds(segments, ends)
            self._evaluate(segments, first, best, behind, True)
            slack = TOLERANCE * np.max(best, where=np.isfinite(best), initial=0.0)
            behind -= np.where(first, 0.0, self._rise(best))
            self._evaluate(segments, ~(behind >= slack) & ~first, best, behind, False)
            if passed is None:
                passing -= self._rise(best)
                if not (passing >= slack).all():
                    passed = self._pass(through, best)
            if passed is not None:
                np.fmin.reduce(passed - best, axis=1, out=passing, initial=np.inf)
        self._behind[ends], self._passing, self._best = behind, passing, best
        times: Times = best.reshape(-1)[:size].copy()
        return times

    def _rise(self, best: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much later the best is than the last one at most, in each block."""
        rise: NDArray[np.float64] = np.fmax.reduce(best - self._best, axis=1, initial=-np.inf)
        return rise

    def _passing_bounds(self, through: Through) -> NDArray[np.float64]:
        """By how much the way through is behind the last best at least, in each block."""
        steps, row = self._passed
        self._passed = through.steps, through.row
        if steps != through.steps:
            return np.full(len(self._passing), -np.inf)
        # Whatever its steps keep, what follows them is seen with no more memory than they have.
        bounds: NDArray[np.float64] = self._passing + through.after.risen_below(through.row, row)
        return bounds

    @staticmethod
    def _pass(through: Through, best: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lower `best` by the way through; returns its times."""
        solved = through.solve()
        times = np.full(best.shape, solved[-1])
        times.reshape(-1)[: len(solved)] = solved
        np.minimum(best, times, out=best)
        return times

    def _bounds(self, segments: Segments, ends: slice) -> NDArray[np.float64]:
        """By how much each end (rows) is behind the last best at least, in each block."""
        twice, after, kept = self._made_of[:, ends]
        moved = segments.kept != kept
        bounds = self._behind[ends] + segments.twice.risen(segments.twice_rows, twice, 0)
        bounds += segments.after.risen(segments.after_rows, after, segments.kept)
        bounds[moved] = -np.inf
        self._made_of[:, ends] = segments.twice_rows, segments.after_rows, segments.kept
        return bounds

    @staticmethod
    def _evaluate(
        segments: Segments,
        which: NDArray[np.bool_],
        best: NDArray[np.float64],
        behind: NDArray[np.float64],
        faster: bool,
    ) -> None:
        """Lower `best` by those ends (rows) in those blocks (columns), and set how far behind they are.

        Args:
            faster: whether most of them are expected to be; otherwise they are compared with the best first.
        """
        found = np.flatnonzero(np.ascontiguousarray(which.T))
        for some in (found[i : i + AT_ONCE] for i in range(0, len(found), AT_ONCE)):
            blocks, ends = np.divmod(some, len(which))
            times = segments.twice.at(segments.twice_rows[ends], blocks, 0)
            times += segments.after.at(segments.after_rows[ends], blocks, segments.kept[ends])
            if not faster:
                ahead = np.fmin.reduce(times - best[blocks], axis=1, initial=np.inf)
                behind[ends, blocks] = ahead
                ahead = np.flatnonzero(ahead < 0)
                if not ahead.size:
                    continue
                blocks, ends, times = blocks[ahead], ends[ahead], times[ahead]
            stops = [*np.flatnonzero(np.diff(blocks)) + 1, len(blocks)]
            for start, stop in pairwise([0, *stops]):
                row = best[blocks[start]]
                np.minimum(row, np.minimum.reduce(times[start:stop], axis=0), out=row)
                times[start:stop] -= row
            behind[ends, blocks] = np.fmin.reduce(times, axis=1, initial=np.inf)


class SegmentCosts:
    """What checkpoints over whole groups discard and keep."""

    def __init__(self, costs: GridCosts) -> None:
        self.costs, table = costs, costs.table
        self._writes = [
            frozenset[str]().union(*map(table.makes.__getitem__, group)) for group in table.groups
        ]
        self._passes: dict[tuple[int, frozenset[str], Pass], Times] = {}
        # Where groups of the same kind end, for each.
        self._next = [*range(1, len(costs.kinds) + 1)]
        for at in reversed(range(len(costs.kinds) - 1)):
            if costs.kinds[at] == costs.kinds[at + 1]:
                self._next[at] = self._next[at + 1]
        # For each boundary between groups and each state tensor that is alive there: who made it.
        positions = [0, *(group.stop for group in table.groups)]
        names = list(table.state_bytes)
        self._units = np.array([costs.units(table.state_bytes[name]) for name in names])
        self._makers = np.full((len(positions), len(names)), -1)
        self._is_output = np.zeros((len(positions), len(names)), bool)
        for row, position in enumerate(positions):
            for version in table.liveness.alive(position):
                column = names.index(version.tensor)
                self._makers[row, column] = version.maker
                self._is_output[row, column] = version in table.liveness.outputs

    def kept(self, group: int, last: int, which: Pass) -> Integers:
        """GridCosts.exit for each end from `group + 1` to `last`."""
        ends = slice(group + 1, last + 1)
        held = self._makers[ends] >= self.costs.table.groups[group].start
        if not which.redo:
            held = held & ~self._is_output[ends]
        units: Integers = held @ self._units
        return units

    def discard_pass(self, group: int, end: int, which: Pass) -> Times:
        """Least time of a discarding pass over whole groups."""
        costs = self.costs
        made, total, at = frozenset[str](), np.zeros(costs.size), group
        while at < end:
            key = costs.kinds[at], made, which
            if key not in self._passes:
                self._passes[key] = costs.discard_pass(at, 0, len(costs.table.groups[at]), made, which)
            # Equal neighbours are multiplied, from the first that makes nothing that was not made before.
            made, before = made | self._writes[at], made
            after = min(end, self._next[at]) if made == before else at + 1
            total = total + (after - at) * self._passes[key]
            at = after
        return total


@lru_cache(maxsize=1)
def different_segments(kinds: tuple[int, ...]) -> tuple[list[tuple[int, int]], Integers]:
    """Start and end of each different run of groups; the run's number from each start to each end."""
    numbers: dict[tuple[int, int], int] = {}
    runs: list[tuple[int, int]] = []
    table = np.full((len(kinds) + 1, len(kinds) + 1), -1)
    for end in range(len(kinds) + 1):
        after = -1
        for group in reversed(range(end)):
            after = table[group, end] = numbers.setdefault((kinds[group], after), len(runs))
            if after == len(runs):
                runs.append((group, end))
    return runs, table
