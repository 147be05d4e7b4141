"""The grid and the price with which the relaxed program proves the most."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.planner.solvers.bounds import dividing_unit, priced
from evoplan.planner.solvers.relaxed import Relaxed, exact

UNITS = 1024  # of memory, about: what a checker in plain Python goes through in seconds
REFINED = 5  # prices that are tried between neighbours of the best one
CLOSE = Fraction(1, 5000)  # of the bound: neighbours so close leave nothing to look for


@dataclass(frozen=True)
class Proof:
    """A bound and what it follows from.

    Attributes:
        seconds: no schedule within the budget is faster; None: none fits.
        unit_bytes: of the grid.
        price: seconds per byte that the first pass keeps.
    """

    seconds: Fraction | None
    unit_bytes: int
    price: Fraction


def best_proof(table: CostTable, budget_bytes: int, units: int = UNITS) -> Proof:
    """The highest bound found for schedules within a budget.

    Args:
        budget_bytes: of `Replay.peak_bytes`, as the dynamic program charges it.
        units: of the grid, about.
    """
    room = budget_bytes - table.bytes_of(table.liveness.outputs)
    unit = dividing_unit(table, room, units)
    relaxed = Relaxed(table, budget_bytes, unit)
    proofs: dict[Fraction, Fraction] = {}

    def at(price: Fraction) -> Fraction | None:
        if price not in proofs:
            seconds = relaxed.seconds(price)
            if seconds is None:
                return None
            proofs[price] = seconds
        return proofs[price]

    if at(Fraction(0)) is None:
        return Proof(None, unit, Fraction(0))
    prices, times = priced(table, None)
    best = float(prices[int(np.argmax(times - prices * (room - table.loss_bytes)))])
    tried = [Fraction(0), *(exact(best * share) for share in (0.5, 1.0, 1.12))] if best else [Fraction(0)]
    for price in tried:
        at(price)
    for _ in range(REFINED if best else 0):  # the bound is concave in the price
        known = sorted(proofs)
        top = max(range(len(known)), key=lambda number: proofs[known[number]])
        around = [known[n] for n in (top - 1, top, top + 1) if 0 <= n < len(known)]
        if proofs[known[top]] - min(proofs[price] for price in around) < CLOSE * proofs[known[top]]:
            break
        low, high = max(pairwise(around), key=lambda pair: pair[1] - pair[0])
        at(exact(float(low + high) / 2))
    price = max(proofs, key=lambda price: proofs[price])
    return Proof(proofs[price], unit, price)
