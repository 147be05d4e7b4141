"""Times of somebody else's blocks as they are, measured on this device: each once under every strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.cost_model import measure
from evoplan.cost_model.calls import discarding
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.foreign.as_they_were import left_as_it_is
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured
from evoplan.model.foreign.inside import ALL_AGAIN, Inside
from evoplan.model.foreign.runs import CallRun, discarded
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.strategy import Strategy

ROUNDS = 5


class MeasuredCalls:
    """Times calls of blocks.

    Args:
        model: with data.
        given: the leaves of what each call is given.
        casting: what forward runs under.
    """

    def __init__(
        self, model: nn.Module, captured: Captured, given: Sequence[Sequence[Any]], casting: Casting
    ) -> None:
        self.model, self.calls, self.given, self.casting = model, captured.calls, given, casting

    def timed(self, call: int, costs: Sequence[StepCost], more: int = 1) -> tuple[StepCost, ...]:
        """Costs of a call with measured times in place of predicted ones.

        Strategies take turns, so that a machine that is busy for a while is so for all; medians count.

        Args:
            more: times as many runs as usual.
        """
        block = self.model.get_submodule(self.calls[call].path)
        with left_as_it_is(self.model), self.casting():
            return _Stopwatch(self.calls[call], block, self.given[call]).timed(costs, more * ROUNDS)

    def table(self, table: CostTable) -> CostTable:
        """A table with measured times; equal calls are measured once."""
        known: dict[int, tuple[StepCost, ...]] = {}
        for call, costs in enumerate(table.options):
            if id(costs) not in known:
                known[id(costs)] = self.timed(call, costs)
        return no_longer_than_checkpoints(
            replace(table, options=tuple(known[id(costs)] for costs in table.options))
        )


def no_longer_than_checkpoints(table: CostTable) -> CostTable:
    """A block that runs again does no more than under a checkpoint: by chance it takes no longer either."""
    known = {id(costs): tuple(_no_longer(cost, costs[0]) for cost in costs) for costs in table.options}
    return replace(table, options=tuple(known[id(costs)] for costs in table.options))


class _Stopwatch:
    """Runs a call of a block and its backward.

    Args:
        leaves: of what it is given.
    """

    def __init__(self, call: Call, block: nn.Module, leaves: Sequence[Any]) -> None:
        self.call, self.block, self.settings = call, block, Settings(block)
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        self.parameters = Parameters(block)

    def timed(self, costs: Sequence[StepCost], rounds: int) -> tuple[StepCost, ...]:
        """The costs, with times; the first round, in which memory is found, does not count."""
        strategies = [cost.strategy for cost in costs]
        # The same run for many of them: what is the least of many measurements of one would be too little.
        bare = [discarding(strategy) for strategy in strategies]
        discards: dict[Strategy, list[float]] = {strategy: [] for strategy in bare}
        records: dict[Strategy, list[tuple[float, float]]] = {strategy: [] for strategy in strategies}
        for number in range(rounds + 1):
            for strategy, times in discards.items():
                found = self._discard_seconds(strategy)
                times += [found] if number else []
            for strategy, pairs in records.items():
                pair = self._record_seconds(strategy)
                pairs += [pair] if number else []
        return tuple(
            replace(
                cost,
                discard_seconds=median(discards[without]),
                forward_seconds=median(forward for forward, _ in records[cost.strategy]),
                backward_seconds=median(backward for _, backward in records[cost.strategy]),
            )
            for cost, without in zip(costs, bare, strict=True)
        )

    def _discard_seconds(self, strategy: Strategy) -> float:
        """Seconds of a run that keeps nothing."""

        def run() -> None:
            with torch.no_grad():
                discarded(self.call, self.block.forward, self.leaves, self._inside(strategy))

        return measure.seconds(run, self.device)

    def _record_seconds(self, strategy: Strategy) -> tuple[float, float]:
        """Seconds of a run that is recorded, and of its backward."""
        runs: list[CallRun] = []

        def run() -> None:
            about = self.call.wanted, self.parameters, self._inside(strategy)
            runs.append(CallRun(self.call, self.block.forward, self.leaves, *about))

        forward = measure.seconds(run, self.device)
        made, _ = runs[0].take()
        grads = [torch.ones_like(tensor) for tensor in made]
        del made
        return forward, measure.seconds(lambda: runs.pop().vjp(grads), self.device)

    def _inside(self, strategy: Strategy) -> Inside:
        call = self.call
        return Inside(strategy, self.block, call.children, self.settings, call.knobs)


def _no_longer(cost: StepCost, whole: StepCost) -> StepCost:
    if cost.strategy.modules != ALL_AGAIN:
        return cost
    return replace(
        cost,
        forward_seconds=min(cost.forward_seconds, whole.discard_seconds),
        backward_seconds=min(cost.backward_seconds, whole.forward_seconds + whole.backward_seconds),
    )
