"""A lower bound that others can check: the program rounded down, with a price on what the first pass keeps.

Whatever fits in bytes fits on a grid on which every size is rounded down, so least times there are bounds.
Rounding loses most where a budget holds many parts; but what the first pass keeps must fit in bytes too, and
may be charged at a price instead (Lagrange): with price * (kept - room) added, which is at most 0 for what
fits, the least time is still a bound. Grid and price are numbers that a certificate states; with them the
bound follows by a short program in whole numbers, which `tools/check_certificate.py` runs too.

    least(k, M) = min over options   ticks + price * kept + least(k+1, M - kept)           M >= need
                  and ends e         twice(k, e, M) + price * exits + least(e, M - exits)

Times are whole picoseconds, each rounded down, so sums are exact and both programs find the same number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import Version
from evoplan.cost_model.steps import StepCost

Ticks = NDArray[np.int64]  # by memory left, in grid units

TICKS = 10**12  # in a second
NEVER = 1 << 61  # later than anything: two hundred days are 2^61 / 8


def exact(seconds: float) -> Fraction:
    """A float as the decimal number that JSON has of it."""
    return Fraction(repr(float(seconds)))


def ticks_of(seconds: Fraction) -> int:
    """Whole picoseconds, rounded down."""
    return int(seconds * TICKS)


class Relaxed:
    """The relaxed program on one grid.

    Args:
        table: costs of the chain, for training.
        budget_bytes: of `Replay.peak_bytes`, as the dynamic program charges it.
        unit_bytes: size of a grid step.
    """

    def __init__(self, table: CostTable, budget_bytes: int, unit_bytes: int) -> None:
        self.table, self.unit_bytes, self.liveness = table, unit_bytes, table.liveness
        self._outputs = frozenset(self.liveness.outputs)
        self.room_bytes = budget_bytes - table.bytes_of(self._outputs)
        self.length = max(0, self.room_bytes + unit_bytes) // unit_bytes
        self._starts = [group.start for group in table.groups]
        self._stops = [group.stop for group in table.groups]
        self._end = len(table.options)
        kinds: dict[Hashable, int] = {}
        alive = [tuple(v.tensor for v in self.liveness.alive(k)) for k in range(self._end + 1)]
        starts = set(self._starts)
        self._kinds = [
            kinds.setdefault(
                (
                    id(table.options[k]),
                    table.step_reads[k],
                    table.makes[k],
                    alive[k],
                    alive[k + 1],
                    k in starts,
                ),
                len(kinds),
            )
            for k in range(self._end)
        ]
        self._runs: dict[
            tuple[int, int], int
        ] = {}  # numbers of different runs of steps: (kind, number of rest)
        self._numbers: dict[int, list[int]] = {}
        self._known: dict[Hashable, Ticks] = {}
        self._costs: dict[int, tuple[int, int, int]] = {}
        self._options: dict[tuple[int, int | None], list[tuple[int, int, int, int]]] = {}

    def seconds(self, price: Fraction) -> Fraction | None:
        """No schedule that fits is faster; None: none fits.

        Args:
            price: seconds per byte that the first pass keeps.
        """
        if self.length == 0:
            return None
        ticks = int(self._first(price)[-1])
        paid = TICKS * price * (self.room_bytes - self.table.loss_bytes)
        return None if ticks >= NEVER // 2 else Fraction(ticks + (-paid) // 1, TICKS)

    def _number(self, a: int, b: int) -> int:
        """Of a run of steps, equal for runs that cost the same on a redo."""
        if b not in self._numbers:
            numbers, after = [0] * (b + 1), -1
            for k in reversed(range(b)):
                after = numbers[k] = self._runs.setdefault((self._kinds[k], after), len(self._runs))
            self._numbers[b] = numbers
        return self._numbers[b][a]

    def _ends(self, k: int, end: int) -> Iterator[int]:
        """Where a checkpoint from step k may end, before `end`: in its group, or with another."""
        group = bisect_right(self._starts, k) - 1
        yield from range(k + 1, min(self._stops[group] + 1, end))
        if k == self._starts[group]:
            yield from (e for e in self._stops[group + 1 :] if e < end)

    def _recorded(self, k: int, b: int | None) -> list[tuple[int, int, int, int]]:
        """What each option needs and keeps in units, its ticks, and bytes kept; dominated ones left out."""
        if (k, b) in self._options:
            return self._options[k, b]
        rows: list[tuple[int, int, int, int]] = []
        for row in sorted(self._rows(k, b)):
            if not any(all(x <= y for x, y in zip(other, row, strict=True)) for other in rows):
                rows.append(row)
        if b is None:  # asked for again at every price
            self._options[k, b] = rows
        return rows

    def _rows(self, k: int, b: int | None) -> Iterator[tuple[int, int, int, int]]:
        table, made, alive = self.table, self.liveness.made_by(k), self.liveness.alive(k + 1)
        left: frozenset[Version] = self._outputs if b is None else frozenset()
        live = -table.bytes_of(left.intersection(made)) if b is None else table.gradient_bytes(b)
        for cost in table.options[k]:
            own = {made[place] for place in cost.keeps_made}
            kept = cost.preserved_bytes + table.bytes_of({*own, *(v for v in made if v in alive)} - left)
            ends = k + 1 == b
            run = cost.ending if ends else cost.forward
            backward, held = cost.backward(in_graph=b is None)
            if own:  # somebody else may hold them too
                backward = max(backward, held + table.bytes_of(own - left))
            if ends:  # nothing follows that would see what is kept
                kept = 0
            need = max(backward, 0 if run is None else run.bytes + live, kept)
            yield need // self.unit_bytes, kept // self.unit_bytes, self._ticks(cost)[1 + ends], kept

    def _ticks(self, cost: StepCost) -> tuple[int, int, int]:
        """Of a discarding run, and of backward with a forward, or with what of that ends a redo."""
        if id(cost) not in self._costs:
            forward, ending, backward, discard = map(
                exact,
                (cost.forward_seconds, cost.ending_seconds, cost.backward_seconds, cost.discard_seconds),
            )
            self._costs[id(cost)] = (
                ticks_of(discard),
                ticks_of(forward + backward),
                ticks_of(ending + backward),
            )
        return self._costs[id(cost)]

    def _discarding(self, k: int, held: int) -> Ticks:
        """The fastest option of a discarding run of one step, by memory left beside what is held."""
        key = "one", id(self.table.options[k]), held
        if key not in self._known:
            best = np.full(self.length, NEVER)
            for cost in self.table.options[k]:
                need = (held + cost.discard_bytes) // self.unit_bytes
                np.minimum(best[need:], self._ticks(cost)[0], out=best[need:])
            self._known[key] = best
        return self._known[key]

    def _discard(self, a: int, b: int, live: int) -> Ticks:
        """The least ticks of a discarding pass over steps a to b."""
        first = b
        while first > a and ("discard", self._number(a, first), live) not in self._known:
            first -= 1
        for e in range(first + 1, b + 1):
            held = live + self.table.bytes_of(self.liveness.made(a, e - 1))
            before = self._known["discard", self._number(a, e - 1), live] if e > a + 1 else 0
            total = np.minimum(before + self._discarding(e - 1, held), NEVER)
            self._known["discard", self._number(a, e), live] = total
        return self._known["discard", self._number(a, b), live]

    def _twice(self, a: int, b: int, live: int) -> Ticks:
        """A discarding pass and a redo."""
        key = "twice", self._number(a, b), live
        if key not in self._known:
            self._known[key] = self._discard(a, b, live) + self._known["redo", self._number(a, b)]
        return self._known[key]

    def _relax(self, best: Ticks, then: Ticks, need: int, kept: int, more: Ticks | int) -> None:
        """best[M] = min(best[M], then[M - kept] + more[M]) for M >= need."""
        if need < self.length:
            added = more[need:] if isinstance(more, np.ndarray) else more
            np.minimum(best[need:], then[need - kept : self.length - kept] + added, out=best[need:])

    def _least(self, k: int, b: int | None, price: Fraction, rows: Callable[[int], Ticks]) -> Ticks:
        """The least ticks from step k on, `rows` being those from later steps on."""
        best = np.full(self.length, NEVER)
        for need, kept, ticks, kept_bytes in self._recorded(k, b):
            self._relax(best, rows(k + 1), need, kept, ticks + int(TICKS * price * kept_bytes))
        left: frozenset[Version] = self._outputs if b is None else frozenset()
        live = 0 if b is None else self.table.gradient_bytes(b)
        for e in self._ends(k, self._end + 1 if b is None else b):
            exit_bytes = self.table.bytes_of(v for v in self.liveness.made(k, e) if v not in left)
            kept, paid = exit_bytes // self.unit_bytes, int(TICKS * price * exit_bytes)
            self._relax(best, rows(e), kept, kept, self._twice(k, e, live) + paid)
        least: Ticks = np.minimum(best, NEVER)
        return least

    def _solve_redos(self) -> None:
        """The least ticks to run steps k to b again and differentiate them, wherever checkpoints may lie."""
        for b in range(1, self._end + 1):
            group = bisect_right(self._starts, b - 1) - 1
            first = 0 if b == self._stops[group] else self._starts[group]
            for k in reversed(range(first, b)):
                if ("redo", self._number(k, b)) not in self._known:
                    self._known["redo", self._number(k, b)] = self._least(
                        k, b, Fraction(0), partial(self._redo, b)
                    )

    def _redo(self, b: int, k: int) -> Ticks:
        return np.zeros(self.length, np.int64) if k == b else self._known["redo", self._number(k, b)]

    def _first(self, price: Fraction) -> Ticks:
        """The least ticks of the whole chain with a price on what the first pass keeps."""
        if not self._known:
            self._solve_redos()
        done = np.full(self.length, NEVER)
        done[self.table.loss_bytes // self.unit_bytes :] = 0
        rows = {self._end: done}
        for k in reversed(range(self._end)):
            rows[k] = self._least(k, None, price, rows.__getitem__)
        return rows[0]
