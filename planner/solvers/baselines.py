"""What people do by hand, as schedules: costed and executed like any other."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.kinds.chunk import Chunk
from evoplan.model.running.strategy import EAGER, Strategy
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence

# How a baseline runs a step: (its costs) -> (recorded strategy, strategy of a discarding run).
Choice = Callable[[tuple[StepCost, ...]], tuple[Strategy, Strategy]]


def as_written(costs: tuple[StepCost, ...]) -> tuple[Strategy, Strategy]:
    """Whole, attention as the formula is written: what people run by hand."""
    return WHOLE, WHOLE


def fastest_kernels(costs: tuple[StepCost, ...]) -> tuple[Strategy, Strategy]:
    """The fastest strategies that are not in pieces: the same by hand with the best kernels there are."""
    able = [cost for cost in costs if not cost.strategy.in_pieces]
    recorded = min(able, key=lambda cost: cost.forward_seconds + cost.backward_seconds)
    return recorded.strategy, min(able, key=lambda cost: cost.discard_seconds).strategy


def _runs(table: CostTable, steps: range, choice: Choice) -> tuple[Run, ...]:
    return tuple(Run(step, choice(table.options[step])[0]) for step in steps)


def _checkpoint(table: CostTable, parts: tuple[Run | Checkpoint, ...], choice: Choice) -> Checkpoint:
    body = Sequence(parts)
    return Checkpoint(body, tuple(choice(table.options[step])[1] for step in body.span))


def keep_everything(table: CostTable, choice: Choice = as_written) -> Sequence:
    """`none`: no recompute at all."""
    return Sequence(_runs(table, range(len(table.options)), choice))


def every_submodule(table: CostTable, choice: Choice = as_written) -> Sequence:
    """`small`: every submodule recomputed on its own."""
    units = table.units or [range(step, step + 1) for step in range(len(table.options))]
    return Sequence(tuple(_checkpoint(table, _runs(table, unit, choice), choice) for unit in units))


def every_block(table: CostTable, choice: Choice = as_written) -> Sequence:
    """`large`: every block recomputed as a whole.

    Source: Jumper et al. (2021), Suppl. 1.11.8.
    """
    return Sequence(tuple(_checkpoint(table, _runs(table, group, choice), choice) for group in table.groups))


def square_root(table: CostTable, choice: Choice = as_written) -> Sequence:
    """`sqrt`: segments of about sqrt(n) blocks, recomputed, and each block in them once more.

    Source: Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
    """
    blocks = [_checkpoint(table, _runs(table, group, choice), choice) for group in table.groups]
    length = max(1, isqrt(len(blocks)))
    segments = [tuple(blocks[i : i + length]) for i in range(0, len(blocks), length)]
    return Sequence(tuple(_checkpoint(table, segment, choice) for segment in segments))


def evenly_chunked(table: CostTable, pieces: int) -> Sequence:
    """Every submodule cut alike, into at most so many chunks; in training every block recomputed.

    Source: one chunk size for all modules, as in OpenFold (Ahdritz et al. 2022).
    """

    def strategy(costs: tuple[StepCost, ...]) -> Strategy:
        offered = [cost.strategy for cost in costs if cost.strategy.kernel == EAGER]
        chunks = [strategy for strategy in offered if strategy.kind == Chunk.name]
        first = [chunk for chunk in chunks if chunk.axis == chunks[0].axis and chunk.n <= pieces]
        return max(first, key=lambda chunk: chunk.n, default=WHOLE)

    strategies = tuple(strategy(costs) for costs in table.options)
    runs = tuple(map(Run, range(len(strategies)), strategies))
    if not table.training:
        return Sequence(runs)
    bodies = [Sequence(runs[group.start : group.stop]) for group in table.groups]
    return Sequence(tuple(Checkpoint(body, strategies[body.span.start : body.span.stop]) for body in bodies))
