"""Ways through a whole group where memory is plenty: what one keeps is rounded once, not step by step.

Of a group on its own only what it keeps and how long it takes matter then, so few ways are worth having, and
on large grids their parts are much smaller than a grid step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evoplan.model.running.strategy import Strategy
from evoplan.planner.solvers.grid import GridCosts, Pass, Times


@dataclass(frozen=True)
class Part:
    """A step recorded, or a checkpoint over the steps up to `stop` (strategy None): bytes kept, seconds."""

    stop: int
    preserved: int
    seconds: float
    strategy: Strategy | None


class Way(NamedTuple):
    """A way through a group, or from one of its steps on: what it keeps, how long it takes, its parts."""

    kept: int
    seconds: float
    parts: tuple[Part, ...] = ()

    def at(self, memory: int, after: Times) -> float:
        """Its time with that much memory, with what follows."""
        return float(after[memory - self.kept] + self.seconds)


@dataclass(frozen=True)
class Ways:
    """Through one group, each faster than the one before, and keeping more.

    Args:
        enough: units of memory from which on every part of every way fits.
        ways: what they keep in units, rounded once.
    """

    enough: int
    ways: tuple[Way, ...]

    def through(self, after: Times) -> Times:
        """Least times with `enough` memory and more; `after` is what follows the group."""
        best = np.full(len(after) - self.enough, np.inf)
        for kept, seconds, _ in self.ways:
            np.minimum(best, after[self.enough - kept : len(after) - kept] + seconds, out=best)
        return best

    def best(self, memory: int, after: Times) -> Way:
        """The fastest with so much memory, which is enough."""
        return min(self.ways, key=lambda way: way.at(memory, after))


class WayFinder:
    """Ways through groups, from exact bytes.

    Args:
        costs: of the grid that they are for.
    """

    def __init__(self, costs: GridCosts) -> None:
        self.costs, self._exact = costs, GridCosts(costs.table, 1, 1)

    def parts(
        self, group: int, at: int, which: Pass, checkpoints: dict[tuple[int, int], Times]
    ) -> list[tuple[Part, int]]:
        """What step `at` of a group may do, and the units of memory it wants."""
        steps, plain = self.costs.table.groups[group], Pass(which.redo)
        found = [
            (Part(at + 1, row.preserved, row.seconds, row.strategy), self._up(row.need) + which.gradients)
            for row in self._exact.recorded(steps[at], plain, False)
        ]
        for (start, end), seconds in checkpoints.items():
            if start == at and np.isfinite(seconds[-1]):
                settled = len(seconds) - int(seconds[::-1].searchsorted(seconds[-1], side="right"))
                kept = self._exact.exit(steps[start:end], plain)
                found.append((Part(end, kept, float(seconds[-1]), None), settled))
        return found

    def find(self, group: int, which: Pass, checkpoints: dict[tuple[int, int], Times]) -> Ways:
        """All ways worth having.

        Args:
            checkpoints: least seconds of those inside the group by (start, stop) and memory.
        """
        size = len(self.costs.table.groups[group])
        ways: list[list[Way]] = [[] for _ in range(size)] + [[Way(0, 0.0)]]
        wanted, most = 1, 0
        for at in reversed(range(size)):
            parts = self.parts(group, at, which, checkpoints)
            wanted = max(wanted, *(units for _, units in parts))
            most += max(self._up(part.preserved) for part, _ in parts)
            ways[at] = _undominated(
                Way(part.preserved + way.kept, part.seconds + way.seconds, (part, *way.parts))
                for part, _ in parts
                for way in ways[part.stop]
            )
        rounded = _undominated(way._replace(kept=self.costs.units(way.kept)) for way in ways[0])
        return Ways(wanted + most, tuple(rounded))

    def _up(self, size_bytes: int) -> int:
        return -(-size_bytes // self.costs.unit_bytes)


def _undominated(ways: Iterable[Way]) -> list[Way]:
    """Those that are faster than any that keeps no more."""
    found: list[Way] = []
    for way in sorted(ways, key=lambda way: way[:2]):
        if not found or way.seconds < found[-1].seconds:
            found.append(way)
    return found
