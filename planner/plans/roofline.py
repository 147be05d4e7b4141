"""The roofline of every submodule under every strategy, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evoplan.cost_model.roofline import Bounds, bounds
from evoplan.model.running.chain import Chain
from evoplan.model.running.strategy import Strategy
from evoplan.planner.problems.costing import Costed, kind_of

PHASES = ("discard", "forward", "backward")


@dataclass(frozen=True)
class Row:
    """One phase of one submodule under one strategy; discard is a forward that keeps nothing."""

    submodule: str
    strategy: Strategy
    phase: str
    bounds: Bounds


def roofline(costed: Costed) -> list[Row]:
    """Every distinct submodule of a problem, under every strategy, in every phase that it has."""
    return list(_rows(costed))


def _rows(costed: Costed) -> Iterator[Row]:
    problem, seen = costed.problem, set()
    link = problem.link_on(costed.device)
    for step, options in zip(Chain.of(costed.model).steps, costed.table.options, strict=True):
        if (kind_of(step.name), id(options)) in seen:
            continue
        seen.add((kind_of(step.name), id(options)))
        for cost in options:
            works = cost.discard_work, cost.forward_work, cost.backward_work
            for phase, work in zip(PHASES, works, strict=True):
                if problem.training or phase == "discard":
                    found = bounds(work, costed.device, problem.precision, link)
                    yield Row(kind_of(step.name), cost.strategy, phase, found)
