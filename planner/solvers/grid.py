"""Costs on a grid of memory: what the dynamic program adds up, rounded up to whole units."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import Version
from evoplan.model.running.strategy import Strategy

MANY = 96  # groups; shorter chains have few parts on any grid
WASTE, FINEST = 0.01, 0.55  # of the state that rounding may add there, and shares of the usual grid step

Made = TypeVar("Made")
Times = NDArray[np.float64]  # seconds by memory left, in grid units; inf where it does not fit


class Pass(NamedTuple):
    """Where a step is recorded: on the first pass, or on a redo, when gradients are live as well.

    Attributes:
        redo: False on the first pass.
        gradients: units of gradients that are live while forward runs.
    """

    redo: bool = False
    gradients: int = 0


FIRST = Pass()


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
    """A cost table in units of `unit_bytes`, for budgets of up to `size - 1` units.

    Args:
        optimistic: round down instead of up. Every schedule that fits then fits here, so least times
            are lower bounds.
    """

    def __init__(self, table: CostTable, unit_bytes: int, size: int, optimistic: bool = False) -> None:
        self.table, self.unit_bytes, self.size, self.optimistic = table, unit_bytes, size, optimistic
        self.liveness = table.liveness
        self.kinds = group_kinds(table)
        self._state_units = {name: self.units(size) for name, size in table.state_bytes.items()}
        self._outputs = set(self.liveness.outputs)
        self._cache: dict[Hashable, Any] = {}

    def units(self, size_bytes: int) -> int:
        """Grid units for so many bytes."""
        return size_bytes // self.unit_bytes if self.optimistic else -(-size_bytes // self.unit_bytes)

    def state_units(self, versions: Iterable[Version]) -> int:
        """Grid units of versions of the state."""
        return sum(self._state_units[version.tensor] for version in versions)

    def outputs_of(self, group: int) -> tuple[int, ...]:
        """The places in a group of steps that make an output."""
        steps = self.table.groups[group]
        return self.cached(
            ("outputs", group),
            lambda: tuple(sorted(v.maker - steps.start for v in self._outputs if v.maker in steps)),
        )

    def redo(self, position: int) -> Pass:
        """The second run of steps that end before `position`."""
        return self.cached(
            ("redo", position), lambda: Pass(True, self.state_units(self.liveness.alive(position)))
        )

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value made once for this key."""
        if key not in self._cache:
            self._cache[key] = make()
        value: Made = self._cache[key]
        return value

    def recorded(self, step: int, which: Pass, ends_redo: bool) -> list[Recorded]:
        """The undominated strategies of a recorded step; `ends_redo` where nobody reads its target."""
        table = self.table
        made, alive = self.liveness.made_by(step), self.liveness.alive(step + 1)
        needed = tuple(version.tensor for version in made if version in alive)
        # Held in any case, and counted with the inputs.
        outputs = () if which.redo else tuple(v.tensor for v in made if v in self._outputs)

        def make() -> list[Recorded]:
            counted = sum(table.state_bytes[name] for name in outputs)
            rows = []
            for cost in table.options[step]:
                own = {made[at].tensor for at in cost.keeps_made}
                new = sum(table.state_bytes[name] for name in own.union(needed))
                preserved = cost.preserved_bytes + new - counted
                backward, held = cost.backward(in_graph=not which.redo)
                if own:  # somebody else may hold them too
                    more = sum(table.state_bytes[name] for name in own - {*outputs})
                    backward = max(backward, held + more)
                run = cost.ending if ends_redo else cost.forward
                if run is None:  # its backward runs it again
                    forward, preserved, seconds = 0, 0, cost.backward_seconds
                else:
                    forward, seconds = run.bytes - counted, run.seconds + cost.backward_seconds
                need = self.units(forward) + (which.gradients if forward else 0)
                kept = self.units(preserved)
                rows.append(Recorded(max(need, self.units(backward), kept), kept, seconds, cost.strategy))
            return _undominated(rows)

        key = ("recorded", id(table.options[step]), needed, which, ends_redo, outputs)
        return self.cached(key, make)

    def discarded(self, step: int) -> list[Discarded]:
        """Strategies of a discarding run, each faster and larger than the one before."""

        def make() -> list[Discarded]:
            rows = [
                Discarded(self.units(cost.discard_bytes), cost.discard_seconds, cost.strategy)
                for cost in self.table.options[step]
            ]
            rows.sort(key=lambda row: (row.need, row.seconds))
            return [
                row for i, row in enumerate(rows) if all(row.seconds < other.seconds for other in rows[:i])
            ]

        return self.cached(("discarded", id(self.table.options[step])), make)

    def exit(self, steps: range, which: Pass) -> int:
        """Units that a checkpoint over those steps leaves behind.

        Outputs are counted with the inputs, but a redo makes its own beside them.
        """

        def make() -> int:
            made = self.liveness.made(steps.start, steps.stop)
            return self.state_units(v for v in made if which.redo or v not in self._outputs)

        return self.cached(("exit", steps.start, steps.stop, which.redo), make)

    def discard_pass(self, group: int, start: int, stop: int, made: frozenset[str], which: Pass) -> Times:
        """Least time of a discarding pass over steps of one group, by memory left.

        Args:
            made: tensors whose version at its start was made inside the checkpoint.
        """
        steps = self.table.groups[group][start:stop]

        def make() -> Times:
            total = np.zeros(self.size)
            for step in steps:
                held = self.state_units(
                    v for v in self.liveness.alive(step) if v.maker >= steps.start or v.tensor in made
                )
                times = np.full(self.size, np.inf)
                for row in self.discarded(step):
                    times[which.gradients + held + row.need :] = row.seconds
                total += times
            return total

        return self.cached(("pass", self.kinds[group], start, stop, made, which), make)

    def discard_strategies(self, steps: range, memory: int, which: Pass) -> tuple[Strategy, ...]:
        """Each step's fastest strategy in a discarding pass within `memory` units."""
        strategies = []
        for step in steps:
            held = self.state_units(self.liveness.made(steps.start, step))
            left = memory - which.gradients - held
            fitting = [row for row in self.discarded(step) if row.need <= left]
            strategies.append(min(fitting, key=lambda row: row.seconds).strategy)
        return tuple(strategies)


def unit_bytes(span: int, units: int, table: CostTable) -> int:
    """A grid step of about span / units, such that what schedules hold rounds up to little more than it is.

    What they hold is state, most of all, and what steps that run whole preserve. Chains of many groups hold
    so much state that a grid twice as fine is worth its time where that divides it and no other step does.
    """
    smallest = max(1, -(-span // units))
    candidates = np.unique(np.linspace(smallest, max(smallest, 1.1 * smallest), 256).astype(np.int64))
    state = list(table.state_bytes.values())
    steps = {id(options): options[0].preserved_bytes for options in table.options}.values()
    sizes = np.array([*state, *steps])
    weights = np.array([len(steps)] * len(state) + [1] * len(steps))
    waste = (-sizes[:, None] % candidates * weights[:, None]).sum(axis=0) / candidates
    best = int(candidates[waste.argmin()])
    if len(table.groups) > MANY and sum(-size % best for size in state) > WASTE * sum(state):
        divisor = math.gcd(*state)
        exact = -(-divisor // max(1, round(divisor / smallest)))
        if FINEST * smallest <= exact <= divisor:
            return exact
    return best


def group_kinds(table: CostTable) -> list[int]:
    """A number for each group, equal where groups cost the same on a redo."""
    alive = [tuple(v.tensor for v in table.liveness.alive(i)) for i in range(len(table.options) + 1)]
    numbers: dict[Hashable, int] = {}
    return [
        numbers.setdefault(
            (
                tuple((id(table.options[step]), table.step_reads[step], table.makes[step]) for step in group),
                tuple(alive[group.start : group.stop + 1]),
            ),
            len(numbers),
        )
        for group in table.groups
    ]


def _undominated(rows: list[Recorded]) -> list[Recorded]:
    """Rows that no other row equals or beats in need, preserved and seconds together."""
    kept: list[Recorded] = []
    for row in sorted(rows, key=lambda row: row[:3]):
        if not any(all(a <= b for a, b in zip(other[:3], row[:3], strict=True)) for other in kept):
            kept.append(row)
    return kept
