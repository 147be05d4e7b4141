"""Items: ways to run a few consecutive steps, for integer programs to choose from.

An item needs, keeps and takes so much. It is a recorded step, a checkpoint with its best body for that
need, or a whole group of steps.
Checkpoints are at most one deep: what they hold is recorded step by step on the redo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.solvers.grid import FIRST, GridCosts, Times
from evoplan.planner.solvers.segments import SegmentCosts

Parts = tuple[Run | Checkpoint, ...]

LEVELS = 256  # memories at which a checkpoint is offered, at most


@dataclass(frozen=True)
class Item:
    """A way to run the steps `start`..`stop`; memory in grid units, `seconds` all told."""

    start: int
    stop: int
    need: int
    kept: int
    seconds: float
    parts: Callable[[int], Parts]  # by the step at which it starts


class ItemMaker:
    """Items of a chain on one grid, from checkpoints at most `max_depth` deep (0 or 1)."""

    def __init__(self, costs: GridCosts, max_depth: int) -> None:
        self.costs, self.table, self.max_depth = costs, costs.table, max_depth
        self._over_groups = SegmentCosts(costs)

    def recorded(self, step: int) -> list[Item]:
        """A step on its own, recorded on the first pass."""
        return [
            Item(step, step + 1, row.need, row.preserved, row.seconds, partial(_alone, row.strategy))
            for row in self.costs.recorded(step, FIRST, False)
        ]

    def redo(self, start: int, stop: int) -> list[Times]:
        """Least seconds to run the rest of start..stop again, recorded step by step, from each step on."""
        which, size = self.costs.redo(stop), self.costs.size
        times = [np.zeros(size)]
        for step in reversed(range(start, stop)):
            best = np.full(size, np.inf)
            for row in self.costs.recorded(step, which, step == stop - 1):
                if row.need < size:
                    after = times[-1][row.need - row.preserved : size - row.preserved] + row.seconds
                    np.minimum(best[row.need :], after, out=best[row.need :])
            times.append(best)
        return times[::-1]

    def twice(self, start: int, stop: int) -> Times:
        """Least seconds of a checkpoint over those steps, by the memory it may need."""
        groups = self.table.groups
        first = next(number for number, group in enumerate(groups) if start in group)
        if stop <= groups[first].stop:
            at = groups[first].start
            discard = self.costs.discard_pass(first, start - at, stop - at, frozenset(), FIRST)
        else:
            last = next(number for number, group in enumerate(groups) if stop == group.stop)
            discard = self._over_groups.discard_pass(first, last + 1, FIRST)
        times = self.redo(start, stop)[0] + discard
        times[: self.costs.exit(range(start, stop), FIRST)] = np.inf
        return times

    def body(self, start: int, stop: int, memory: int) -> Checkpoint:
        """The checkpoint that takes `twice(start, stop)[memory]`."""
        which, left, runs = self.costs.redo(stop), memory, []
        times = self.redo(start, stop)
        for step in range(start, stop):
            after = times[step - start + 1]
            rows = [row for row in self.costs.recorded(step, which, step == stop - 1) if row.need <= left]
            row = min(rows, key=lambda row: row.seconds + after[left - row.preserved])
            runs.append(Run(step, row.strategy))
            left -= row.preserved
        return Checkpoint(
            Sequence(tuple(runs)), self.costs.discard_strategies(range(start, stop), memory, FIRST)
        )

    def checkpoints(self, start: int, stop: int) -> list[Item]:
        """Checkpoints over those steps, one for each memory at which the best of them gets faster."""
        if self.max_depth == 0:
            return []
        times, length = self.twice(start, stop), stop - start
        kept = self.costs.exit(range(start, stop), FIRST)
        needs = np.flatnonzero(times < np.concatenate([[np.inf], times[:-1]]))
        if len(needs) > LEVELS:
            needs = needs[np.linspace(0, len(needs) - 1, LEVELS).astype(int)]
        seconds = times[needs]
        if self.costs.optimistic:  # of the needs that were left out, the time of the largest
            seconds = times[np.concatenate([needs[1:] - 1, [len(times) - 1]])] if len(needs) else seconds
        return [
            Item(start, stop, int(need), kept, float(took), partial(self._only_body, length, int(need)))
            for need, took in zip(needs, seconds, strict=True)
        ]

    def _only_body(self, length: int, memory: int, at: int) -> Parts:
        return (self.body(at, at + length, memory),)


def _alone(strategy: Strategy, at: int) -> Parts:
    return (Run(at, strategy),)


class GroupTable:
    """Least seconds of a group by (memory that it may need, units that it keeps).

    Args:
        size: of either; more than that many units make the group no faster.
    """

    def __init__(self, maker: ItemMaker, group: int, size: int) -> None:
        self.maker, self.steps = maker, maker.table.groups[group]
        self.size = size
        self._arrays: dict[tuple[int, int], Times] = {}
        self.tables = [np.full((size, size), np.inf) for _ in range(len(self.steps) + 1)]
        self.tables[-1][:, 0] = 0.0
        for at in reversed(range(len(self.steps))):
            for stop, need, kept, seconds in self._choices(at):
                self._relax(self.tables[at], self.tables[stop], need, kept, seconds)

    def _choices(self, at: int) -> list[tuple[int, int, int, Times | float]]:
        """(stop, need, kept, seconds or seconds by memory) of what step `at` may do."""
        maker, steps = self.maker, self.steps
        choices: list[tuple[int, int, int, Times | float]] = [
            (at + 1, row.need, row.preserved, row.seconds)
            for row in maker.costs.recorded(steps[at], FIRST, False)
        ]
        if maker.max_depth:
            for stop in range(at + 1, len(steps) + 1):
                if (at, stop) not in self._arrays:
                    self._arrays[at, stop] = maker.twice(steps[at], steps[stop - 1] + 1)[: self.size]
                kept = maker.costs.exit(steps[at:stop], FIRST)
                choices.append((stop, kept, kept, self._arrays[at, stop]))
        return choices

    def _relax(self, best: Times, then: Times, need: int, kept: int, seconds: Times | float) -> None:
        size = len(best)
        if need >= size:
            return
        cost = seconds[need:, None] if isinstance(seconds, np.ndarray) else seconds
        times = then[need - kept : size - kept, : size - kept] + cost
        np.minimum(best[need:, kept:], times, out=best[need:, kept:])

    def items(self) -> list[Item]:
        """One for each (need, kept) that is faster than any with less of both."""
        table = np.minimum.accumulate(self.tables[0], axis=1)
        faster = table < np.pad(table[:-1], ((1, 0), (0, 0)), constant_values=np.inf)
        faster &= table < np.pad(table[:, :-1], ((0, 0), (1, 0)), constant_values=np.inf)
        return [
            Item(self.steps.start, self.steps.stop, int(need), int(kept), float(table[need, kept]),
                 partial(self.parts, memory=int(need), kept=int(kept)))
            for need, kept in zip(*np.nonzero(faster), strict=True)
        ]  # fmt: skip

    def parts(self, first: int, memory: int, kept: int) -> Parts:
        """The way through the group that starts at step `first` with that need and keeps that much."""
        parts: list[Run | Checkpoint] = []
        at, strategies = 0, self.maker.costs
        while at < len(self.steps):
            rows = strategies.recorded(self.steps[at], FIRST, False)
            best, choice = np.inf, None
            for number, (stop, need, keeps, seconds) in enumerate(self._choices(at)):
                if need > memory or keeps > kept:
                    continue
                cost = seconds[memory] if isinstance(seconds, np.ndarray) else seconds
                total = cost + self.tables[stop][memory - keeps, kept - keeps]
                if total < best:
                    best, choice = total, (number, stop, keeps)
            assert choice is not None
            number, stop, keeps = choice
            if number < len(rows):
                parts.append(Run(first + at, rows[number].strategy))
            else:
                parts.append(self.maker.body(first + at, first + stop, memory))
            at, memory, kept = stop, memory - keeps, kept - keeps
        return tuple(parts)
