"""Times of somebody else's blocks as they are, measured on this device: each once under every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.cost_model import measure
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured
from evoplan.model.foreign.inside import Inside
from evoplan.model.foreign.rehearsal import left_as_it_is
from evoplan.model.foreign.runs import CallRun, discarded
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.strategy import Strategy

ROUNDS = 5


def with_measured_times(
    model: nn.Module,
    captured: Captured,
    table: CostTable,
    given: Sequence[Sequence[Any]],
    casting: Casting,
    rounds: int = ROUNDS,
) -> CostTable:
    """A table with measured times in place of predicted ones; equal calls are measured once.

    Strategies take turns, so that a machine that is busy for a while is so for all of them; medians count.

    Args:
        model: with data.
        given: the leaves of what each call is given.
        casting: what forward runs under.
    """
    known: dict[int, tuple[StepCost, ...]] = {}
    options = []
    for call, costs in zip(captured.calls, table.options, strict=True):
        if id(costs) not in known:
            block = model.get_submodule(call.path)
            with left_as_it_is(model), casting():
                known[id(costs)] = _Stopwatch(call, block, given[call.index]).timed(costs, rounds)
        options.append(known[id(costs)])
    return replace(table, options=tuple(options))


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
        found = [[self._times(cost.strategy) for cost in costs] for _ in range(rounds + 1)][1:]
        seconds = [[median(times) for times in zip(*one, strict=True)] for one in zip(*found, strict=True)]
        return tuple(
            replace(cost, discard_seconds=discard, forward_seconds=forward, backward_seconds=backward)
            for cost, (discard, forward, backward) in zip(costs, seconds, strict=True)
        )

    def _times(self, strategy: Strategy) -> tuple[float, float, float]:
        """Seconds of a run that keeps nothing, of one that is recorded, and of its backward."""
        runs: list[CallRun] = []

        def discard() -> None:
            with torch.no_grad():
                discarded(self.call, self.block.forward, self.leaves, self._inside(strategy))

        def forward() -> None:
            inside = self._inside(strategy)
            runs.append(
                CallRun(self.call, self.block.forward, self.leaves, self.call.wanted, self.parameters, inside)
            )

        times = self._seconds(discard), self._seconds(forward)
        made, _ = runs[0].take()
        grads = [torch.ones_like(tensor) for tensor in made]
        del made
        return *times, self._seconds(lambda: runs.pop().vjp(grads))

    def _inside(self, strategy: Strategy) -> Inside:
        call = self.call
        return Inside(strategy, self.block, call.children, self.settings, call.knobs)

    def _seconds(self, run: Callable[[], object]) -> float:
        return measure.seconds(run, self.device)
