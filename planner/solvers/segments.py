"""Checkpoints over whole groups: the part of the recurrence that is quadratic in the chain's length.

Of the many ends that a checkpoint may have, few can be best at any memory. Times fall with memory,
so comparing all ends at a few points rules out most of them between the points; the rest are
evaluated in full. Nothing is lost by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evoplan.planner.solvers.grid import GridCosts, Pass, Times

Integers = NDArray[np.int64]


class TimesTable:
    """Rows of least times, and samples of each: at the points, and at the points less `shift`."""

    def __init__(self, rows: int, size: int, points: Integers, shift: int) -> None:
        self.rows = np.full((rows, size), np.inf)
        self.samples = np.full((rows, len(points)), np.inf)
        self.shifted = np.full((rows, len(points)), np.inf)
        self.points, self.shift = points, shift

    def fill(self, row: int, times: Times) -> None:
        """Set a row."""
        self.rows[row] = times
        self.samples[row] = times[self.points]
        self.shifted[row] = self.at(row, self.points - self.shift)

    def row(self, number: int) -> Times:
        """A row, which may be written into."""
        times: Times = self.rows[number]
        return times

    def at(self, row: int, memory: Integers) -> Times:
        """Times with so much memory left; infinite where it is negative."""
        return np.where(memory < 0, np.inf, self.rows[row, np.maximum(memory, 0)])


def sample_points(size: int, groups: int) -> Integers:
    """Indices of a grid, first and last included, denser where memory is little and times are steep."""
    count = min(96, 8 + groups // 4)
    spread = np.geomspace(min(64, size), size, count).astype(np.int64) - 1
    return np.unique(np.concatenate([[0], spread]))


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

    def relax(self, best: Times) -> None:
        """Lower `best` wherever one of them is faster."""
        points = self.twice.points
        sampled = self._sampled()
        fastest = sampled.argmin(axis=0)
        bound = np.minimum(best[points], sampled[fastest, np.arange(len(points))])
        # Slower at the next point than the best is at this one: slower all the way between them.
        wins = np.append(sampled[:, 1:], sampled[:, -1:], axis=1) < bound
        wins[fastest, np.arange(len(points))] |= np.isfinite(bound)
        stops = [*points[1:].tolist(), len(best)]
        for block in np.flatnonzero(wins.any(axis=0)):
            self._relax_block(best, np.flatnonzero(wins[:, block]), int(points[block]), stops[block])

    def _sampled(self) -> NDArray[np.float64]:
        """The time of each (rows) at the points (columns)."""
        points = self.twice.points
        times = self.after.shifted[self.after_rows]
        for k in np.flatnonzero(self.kept != self.after.shift):
            times[k] = self.after.at(self.after_rows[k], points - self.kept[k])
        times += self.twice.samples[self.twice_rows]
        return times

    def _relax_block(self, best: Times, rows: Integers, start: int, stop: int) -> None:
        kept = self.kept[rows]
        for keep in {*kept.tolist()}:
            first, of = max(start, keep), rows[kept == keep]
            if first < stop:
                times = self.twice.rows[self.twice_rows[of], first:stop]
                times += self.after.rows[self.after_rows[of], first - keep : stop - keep]
                np.minimum(best[first:stop], times.min(axis=0), out=best[first:stop])


class SegmentCosts:
    """What checkpoints over whole groups discard and keep."""

    def __init__(self, costs: GridCosts) -> None:
        self.costs, table = costs, costs.table
        self._writes = [
            frozenset[str]().union(*map(table.makes.__getitem__, group)) for group in table.groups
        ]
        self._passes: dict[tuple[int, frozenset[str], Pass], Times] = {}
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
        costs, state = self.costs, len(self._units)
        made, total, count, last = frozenset[str](), np.zeros(costs.size), 0, None
        for at in range(group, end):  # equal neighbours are multiplied
            key = costs.kinds[at], made, which
            if key not in self._passes:
                self._passes[key] = costs.discard_pass(at, 0, len(costs.table.groups[at]), made, which)
            if self._passes[key] is not last:
                total = total if last is None else total + count * last
                last, count = self._passes[key], 0
            count += 1
            if len(made) < state:
                made = made | self._writes[at]
        return total if last is None else total + count * last
