"""What people do by hand, as schedules: costed and executed like any other."""

from __future__ import annotations

from math import isqrt

from cost_model.costs import CostTable, StepCost
from model.strategy import WHOLE, Strategy
from planner.schedule import Checkpoint, Run, Sequence


def _whole(steps: range) -> tuple[Run, ...]:
    return tuple(Run(step, WHOLE) for step in steps)


def _checkpoint(parts: tuple[Run | Checkpoint, ...]) -> Checkpoint:
    body = Sequence(parts)
    return Checkpoint(body, (WHOLE,) * len(body.span))


def keep_everything(table: CostTable) -> Sequence:
    """`none`: no recompute at all."""
    return Sequence(_whole(range(len(table.options))))


def every_submodule(table: CostTable) -> Sequence:
    """`small`: every submodule recomputed on its own."""
    units = table.units or [range(step, step + 1) for step in range(len(table.options))]
    return Sequence(tuple(_checkpoint(_whole(unit)) for unit in units))


def every_block(table: CostTable) -> Sequence:
    """`large`: every block recomputed as a whole.

    Source: Jumper et al. (2021), Suppl. 1.11.8.
    """
    return Sequence(tuple(_checkpoint(_whole(group)) for group in table.groups))


def square_root(table: CostTable) -> Sequence:
    """`sqrt`: segments of about sqrt(n) blocks, recomputed, and each block in them once more.

    Source: Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
    """
    blocks = [_checkpoint(_whole(group)) for group in table.groups]
    length = max(1, isqrt(len(blocks)))
    segments = [tuple(blocks[i : i + length]) for i in range(0, len(blocks), length)]
    return Sequence(tuple(_checkpoint(segment) for segment in segments))


def evenly_chunked(table: CostTable, pieces: int) -> Sequence:
    """Every submodule cut alike, into at most so many chunks; in training every block recomputed.

    Source: one chunk size for all modules, as in OpenFold (Ahdritz et al. 2022).
    """

    def strategy(costs: tuple[StepCost, ...]) -> Strategy:
        chunks = [cost.strategy for cost in costs if cost.strategy.kind == "chunk"]
        first = [chunk for chunk in chunks if chunk.axis == chunks[0].axis and chunk.n <= pieces]
        return max(first, key=lambda chunk: chunk.n, default=WHOLE)

    strategies = tuple(strategy(costs) for costs in table.options)
    runs = tuple(map(Run, range(len(strategies)), strategies))
    if not table.training:
        return Sequence(runs)
    bodies = [Sequence(runs[group.start : group.stop]) for group in table.groups]
    return Sequence(tuple(Checkpoint(body, strategies[body.span.start : body.span.stop]) for body in bodies))
