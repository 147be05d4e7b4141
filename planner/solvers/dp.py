"""The dynamic program over (inter_mem, preserved_mem, time): every budget in one solve.

With memory M left above everything that is held, the least time for the rest of the chain is a
step function of M alone. So it is an array over a grid of M, and preserving p bytes shifts it by p:

    first(i, M) = min of
      time(k) + first(i+1, M - preserved(k))                        step i recorded under strategy k
                                                                    needs M >= max(forward, backward)
      D(i, j, M) + first(j, M - exit(j)) + redo(i, j, M)            steps i..j under one Checkpoint

`redo(i, j, M)` is the same program for the second run of a segment, where the gradients G of the
state are live as well; its own checkpoints nest, each over strictly fewer steps, so one table
holds every depth. D is the least time of a discarding pass. Segments lie inside one block or cover
whole blocks. Costs are rounded up to the grid, so a plan never exceeds its budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_model.costs import CostTable, StepCost
from model.strategy import Strategy
from planner.schedule import Checkpoint, Run, Sequence

Times = NDArray[np.float64]  # seconds by memory left, in grid units; inf where it does not fit


@dataclass(frozen=True)
class _Option:
    """A strategy's cost in grid units."""

    strategy: Strategy
    forward: int
    preserved: int
    backward: int
    forward_seconds: float
    seconds: float


@dataclass(frozen=True)
class _Discard:
    strategy: Strategy
    need: int
    seconds: float


def _shift(times: Times, units: int) -> Times:
    """times at M - units."""
    if units == 0:
        return times
    shifted = np.full_like(times, np.inf)
    if units < len(times):
        shifted[units:] = times[:-units]
    return shifted


@dataclass(eq=False)
class Grid:
    """The program on one grid of memory: `units` steps of `unit_bytes`.

    Args:
        table: costs of the chain; equal blocks share their options by identity.
        unit_bytes: size of a grid step; every cost is rounded up to it.
        units: the largest budget, in grid steps.
        max_depth: how deep checkpoints may nest; None for any depth.
    """

    table: CostTable
    unit_bytes: int
    units: int
    max_depth: int | None = None
    _segments: dict = field(default_factory=dict)
    _redo: dict = field(default_factory=dict)

    # --- costs on the grid ---

    def _units(self, size: int) -> int:
        return -(-size // self.unit_bytes)

    def _options(self, step: int, final: bool) -> list[_Option]:
        """Undominated strategies. A final step's target is an output, which is held in any case."""
        new = self.table.state_bytes[self.table.targets[step]]
        made, extra = (0, new) if final else (new, 0)
        options = [
            _Option(
                cost.strategy,
                self._units(cost.forward_bytes - extra),
                self._units(cost.preserved_bytes + made),
                self._units(cost.backward_bytes),
                cost.forward_seconds,
                cost.forward_seconds + cost.backward_seconds,
            )
            for cost in self.table.options[step]
        ]
        return _undominated(options)
