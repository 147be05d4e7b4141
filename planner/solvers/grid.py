"""Costs on a grid of memory: what the dynamic program adds up, rounded up to whole units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cost_model.costs import CostTable
from model.strategy import Strategy

Times = NDArray[np.float64]  # seconds by memory left, in grid units; inf where it does not fit


class Pass(Enum):
    """Where a step is recorded: on the first pass, or on a redo, when gradients are live as well."""

    FIRST = "first"
    REDO = "redo"


class Recorded(NamedTuple):
    """A strategy of a recorded step: memory it needs, units kept until its backward, its time."""

    need: int
    preserved: int
    seconds: float
    strategy: Strategy


class Discarded(NamedTuple):
    """A strategy of a discarding run."""

    need: int
    seconds: float
    strategy: Strategy


class GridCosts:
    """A cost table in units of `unit_bytes`, for budgets of up to `size - 1` units."""

    def __init__(self, table: CostTable, unit_bytes: int, size: int) -> None:
        self.table, self.unit_bytes, self.size = table, unit_bytes, size
        self.kinds = _kinds(table)
        self.gradients = self.units(table.gradient_bytes)
        self.targets = table.targets
        self._writes = _last_writes(self.targets, table.state_bytes)
        self._outputs = self._writes[-1]  # the steps that make the outputs
        self.everything = self.fresh(range(len(self.targets)))
        self._cache: dict[tuple, object] = {}

    def units(self, size_bytes: int) -> int:
        """Grid units that hold so many bytes."""
        return -(-size_bytes // self.unit_bytes)

    def cached(self, key: tuple, make: Callable[[], object]) -> object:
        """The value made once for this key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def live(self, which: Pass) -> int:
        """Units of gradients that are live while forward runs."""
        return self.gradients if which is Pass.REDO else 0

    def recorded(self, step: int, which: Pass, ends_redo: bool) -> list[Recorded]:
        """The undominated strategies of a recorded step; `ends_redo` where nobody reads its target."""
        table = self.table
        target = self.targets[step]
        output = which is Pass.FIRST and self._outputs[target] == step

        def make() -> list[Recorded]:
            new = table.state_bytes[target]
            rows = []
            for cost in table.options[step]:
                forward, preserved = cost.forward_bytes, cost.preserved_bytes + new
                seconds = cost.forward_seconds + cost.backward_seconds
                if output:  # held in any case, and counted with the inputs
                    forward, preserved = forward - new, preserved - new
                if ends_redo and cost.strategy.kind != "whole":  # its backward runs it again
                    forward, preserved, seconds = 0, 0, cost.backward_seconds
                need = self.units(forward) + (self.live(which) if forward else 0)
                kept = self.units(preserved)
                rows.append(
                    Recorded(max(need, self.units(cost.backward_bytes), kept), kept, seconds, cost.strategy)
                )
            return _undominated(rows)

        key = ("recorded", id(table.options[step]), target, which, ends_redo, output)
        return self.cached(key, make)

    def discarded(self, step: int) -> list[Discarded]:
        """Strategies of a discarding run, each faster and larger than the one before."""

        def make() -> list[Discarded]:
            rows = [
                Discarded(self.units(cost.discard_bytes), cost.forward_seconds, cost.strategy)
                for cost in self.table.options[step]
            ]
            rows.sort(key=lambda row: (row.need, row.seconds))
            return [
                row for i, row in enumerate(rows) if all(row.seconds < other.seconds for other in rows[:i])
            ]

        return self.cached(("discarded", id(self.table.options[step])), make)

    def fresh(self, steps: range) -> int:
        """Units of the state tensors that those steps make."""
        made = self._writes[steps.stop]
        return sum(
            self.units(size) for name, size in self.table.state_bytes.items() if made[name] >= steps.start
        )

    def exit(self, steps: range, which: Pass) -> int:
        """Units that a checkpoint over those steps leaves behind.

        Outputs are counted with the inputs, but a redo makes its own beside them.
        """
        made = self._writes[steps.stop]
        return sum(
            self.units(size)
            for name, size in self.table.state_bytes.items()
            if made[name] >= steps.start and (which is Pass.REDO or made[name] != self._outputs[name])
        )

    def discard_pass(self, group: int, start: int, stop: int, entered_fresh: bool, which: Pass) -> Times:
        """Least time of a discarding pass over steps of one group, by memory left.

        Args:
            entered_fresh: the whole state at its start was made inside the checkpoint.
        """
        steps = self.table.groups[group][start:stop]

        def make() -> Times:
            total = np.zeros(self.size)
            for step in steps:
                held = self.everything if entered_fresh else self.fresh(range(steps.start, step))
                times = np.full(self.size, np.inf)
                for row in self.discarded(step):
                    times[self.live(which) + held + row.need :] = row.seconds
                total += times
            return total

        return self.cached(("pass", self.kinds[group], start, stop, entered_fresh, which), make)

    def discard_strategies(self, steps: range, memory: int, which: Pass) -> tuple[Strategy, ...]:
        """Each step's fastest strategy in a discarding pass within `memory` units."""
        strategies = []
        for step in steps:
            left = memory - self.live(which) - self.fresh(range(steps.start, step))
            fitting = [row for row in self.discarded(step) if row.need <= left]
            strategies.append(min(fitting, key=lambda row: row.seconds).strategy)
        return tuple(strategies)


def _kinds(table: CostTable) -> list[int]:
    """A number for each group, equal where groups cost the same."""
    numbers: dict[tuple, int] = {}
    return [
        numbers.setdefault(
            tuple((id(table.options[step]), table.step_reads[step]) for step in group), len(numbers)
        )
        for group in table.groups
    ]


def _last_writes(targets: tuple[str, ...], names: Iterable[str]) -> list[dict[str, int]]:
    """For each position of the chain, the last step before it that wrote each tensor; -1 for none."""
    writes = [dict.fromkeys(names, -1)]
    for step, target in enumerate(targets):
        writes.append({**writes[-1], target: step})
    return writes


def _undominated(rows: list[Recorded]) -> list[Recorded]:
    """Rows that no other row equals or beats in need, preserved and seconds together."""
    kept: list[Recorded] = []
    for row in sorted(rows, key=lambda row: row[:3]):
        if not any(all(a <= b for a, b in zip(other[:3], row[:3], strict=True)) for other in kept):
            kept.append(row)
    return kept
