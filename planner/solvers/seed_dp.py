"""The flat program that evoplan grew from, as a baseline.

Each submodule on its own is kept, run in pieces, or recomputed: a tuple (inter_mem, preserved_mem, time).
f(i, p, q), the least time of the first i submodules with largest inter_mem p and preserved q, follows

    f(i, max(p, r), q + s) = min(f(i-1, p, q) + t(r, s))

and a schedule fits if p + q does: as if the largest transient came when everything is held. That is an
upper bound of the peak; every submodule's output is preserved.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.solvers.grid import unit_bytes

UNITS = 4096


class Option(NamedTuple):
    """A way to run one submodule."""

    inter: int
    preserved: int
    seconds: float
    strategy: Strategy
    recomputed: bool

    def part(self, step: int) -> Run | Checkpoint:
        """It as a part of a schedule."""
        run = Run(step, self.strategy)
        return Checkpoint(Sequence((run,)), (WHOLE,)) if self.recomputed else run


class SeedProgram:
    """The flat program of one chain."""

    def __init__(self, table: CostTable) -> None:
        self.table = table

    @cached_property
    def options(self) -> list[tuple[Option, ...]]:
        """Of each step; equal steps share one tuple."""
        made: dict[tuple[int, int, int], tuple[Option, ...]] = {}
        chosen = []
        for step, costs in enumerate(self.table.options):
            new = self.table.made_bytes(step)
            gradients = self.table.gradient_bytes(step + 1)
            key = id(costs), new, gradients
            if key not in made:
                options = []
                for cost in costs:
                    preserved = cost.preserved_bytes + new
                    inter = max(cost.forward_bytes, cost.backward_bytes + new) - preserved
                    seconds = cost.forward_seconds + cost.backward_seconds
                    options.append(Option(inter, preserved, seconds, cost.strategy, False))
                whole = next(cost for cost in costs if cost.strategy == WHOLE)
                # The second run makes its target beside the first one, which may be an output.
                assert whole.ending is not None  # it is not in pieces
                inter = max(whole.discard_bytes, whole.ending.bytes + gradients, whole.backward_bytes)
                seconds = whole.discard_seconds + whole.ending.seconds + whole.backward_seconds
                options.append(Option(inter, new, seconds, WHOLE, True))
                made[key] = tuple(options)
            chosen.append(made[key])
        return chosen

    def schedule(self, budget_bytes: int | None) -> Sequence | None:
        """Its fastest schedule within a budget; None if it finds none."""
        loss = self.table.loss_bytes
        inters = sorted({loss, *(option.inter for options in self.options for option in options)})
        everything = sum(max(option.preserved for option in options) for options in self.options)
        budget = 2 * everything + inters[-1] if budget_bytes is None else budget_bytes
        best, found = np.inf, None
        for inter in inters:
            if inter < loss or inter > budget:
                continue
            times = self._times(inter, budget - inter)
            if times is not None and times[0][-1] < best:
                best, found = times[0][-1], (inter, budget - inter, times)
        return None if found is None else self._read(*found)

    def least(self) -> Sequence:
        """Its schedule for the least budget that it finds one for."""
        best = None
        for inter in sorted({option.inter for options in self.options for option in options}):
            fitting = [[o for o in options if o.inter <= inter] for options in self.options]
            if inter < self.table.loss_bytes or not all(fitting):
                continue
            chosen = [min(options, key=lambda option: option.preserved) for options in fitting]
            needed = inter + sum(option.preserved for option in chosen)
            if best is None or needed < best[0]:
                best = needed, chosen
        assert best is not None
        return Sequence(tuple(option.part(step) for step, option in enumerate(best[1])))

    def _within(self, step: int, inter: int, unit: int) -> list[tuple[int, Option]]:
        """Options of a step and the units that they preserve, each faster than all that preserve less."""
        fitting = sorted(
            (-(-option.preserved // unit), option.seconds, number, option)
            for number, option in enumerate(self.options[step])
            if option.inter <= inter
        )
        kept: list[tuple[int, Option]] = []
        for units, _, _, option in fitting:
            if not kept or option.seconds < kept[-1][1].seconds:
                kept.append((units, option))
        return kept

    def _times(self, inter: int, memory: int) -> list[np.ndarray] | None:
        """For each step, least seconds from it on by memory left for what is preserved."""
        unit = unit_bytes(memory, UNITS, self.table)
        size = memory // unit + 1
        alike = {id(o): step for step, o in enumerate(self.options)}  # one of the steps that share options
        choices = {key: self._within(step, inter, unit) for key, step in alike.items()}
        needed = sum(choices[id(o)][0][0] if choices[id(o)] else size for o in self.options)
        if needed >= size:
            return None
        times = [np.zeros(size)]
        for options in reversed(self.options):
            best = np.full(size, np.inf)
            for units, option in choices[id(options)]:
                if units < size:
                    after = times[0][: size - units] + option.seconds
                    np.minimum(best[units:], after, out=best[units:])
            times.insert(0, best)
        return times

    def _read(self, inter: int, memory: int, times: list[np.ndarray]) -> Sequence:
        unit = unit_bytes(memory, UNITS, self.table)
        left, parts = memory // unit, []
        for step in range(len(self.options)):
            after = times[step + 1]
            rows = [row for row in self._within(step, inter, unit) if row[0] <= left]
            units, option = min(rows, key=lambda row: row[1].seconds + after[left - row[0]])
            parts.append(option.part(step))
            left -= units
        return Sequence(tuple(parts))
