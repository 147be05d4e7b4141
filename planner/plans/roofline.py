"""The roofline of every submodule under every strategy, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evoplan.cost_model.roofline import Bounds, bounds
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.chain import Chain
from evoplan.model.running.strategy import Strategy
from evoplan.planner.problems.costing import Costed, kind_of

PHASES = ("discard", "forward", "backward")


@dataclass(frozen=True)
class Row:
    """One phase of one submodule under one strategy; discard is a forward that keeps nothing.

    Attributes:
        blocks: first and last of those whose costs these are; None where the submodule costs the same in all.
    """

    submodule: str
    blocks: tuple[int, int] | None
    strategy: Strategy
    phase: str
    bounds: Bounds

    @property
    def label(self) -> str:
        """The submodule, and where others of its kind cost something else, of which blocks."""
        if self.blocks is None:
            return self.submodule
        first, last = self.blocks
        return (
            f"{self.submodule} (block {first})"
            if first == last
            else (f"{self.submodule} (blocks {first}-{last})")
        )


def roofline(costed: Costed) -> list[Row]:
    """Every distinct submodule of a problem, under every strategy, in every phase that it has."""
    return list(_rows(costed))


def _rows(costed: Costed) -> Iterator[Row]:
    problem, link = costed.problem, costed.problem.link_on(costed.device)
    for (name, blocks), options in _alike(costed).items():
        for cost in options:
            works = cost.discard_work, cost.forward_work, cost.backward_work
            for phase, work in zip(PHASES, works, strict=True):
                if problem.training or phase == "discard":
                    found = bounds(work, costed.device, problem.precision, link)
                    yield Row(name, blocks, cost.strategy, phase, found)


def _alike(costed: Costed) -> dict[tuple[str, tuple[int, int] | None], tuple[StepCost, ...]]:
    """Costs by submodule and blocks: blocks with the same work are one."""
    groups: dict[str, list[tuple[tuple[StepCost, ...], list[int]]]] = {}
    for step, options in zip(Chain.of(costed.model).steps, costed.table.options, strict=True):
        own = groups.setdefault(kind_of(step.name), [])
        blocks = next((blocks for known, blocks in own if _same_work(known, options)), None)
        if blocks is None:
            own.append((options, blocks := []))
        blocks.append(int(step.name.partition("blocks.")[2].partition(".")[0]))
    return {
        (name, (min(blocks), max(blocks)) if len(own) > 1 else None): options
        for name, own in groups.items()
        for options, blocks in own
    }


def _same_work(one: tuple[StepCost, ...], other: tuple[StepCost, ...]) -> bool:
    if one is other:
        return True
    works = (
        [(c.strategy, c.discard_work, c.forward_work, c.backward_work) for c in costs]
        for costs in (one, other)
    )
    return next(works) == next(works)
