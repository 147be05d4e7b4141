"""Predicted times of somebody else's blocks, and which ways to run one are worth having by them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from evoplan.cost_model.devices import Device
from evoplan.cost_model.roofline import seconds
from evoplan.cost_model.steps import StepCost
from evoplan.model.foreign.inside import ALL_AGAIN
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import REDO, Strategy

# Seconds, forward and backward, that Python takes beside the operators, which the roofline knows nothing of:
# for each operator of a lean block, which it is asked about, and for each module that is run otherwise.
# Not for the block itself, of which a checkpoint takes as much, which is not counted either.
# Measured on blocks of a Pairformer and an Evoformer on a CPU; of large tensors it is little.
LEAN_SECONDS = 60e-6, 20e-6
WAY_SECONDS = {REDO: (0.4e-3, 0.8e-3), WHOLE.kind: (0.2e-3, 0.2e-3), LEAN.kind: (0.5e-3, 0.4e-3)}
SLICED_SECONDS = 0.4e-3, 0.8e-3


def timed(cost: StepCost, device: Device, precision: str) -> StepCost:
    """A cost with predicted times.

    Args:
        precision: what products are done in, by the name of a dtype.
    """
    lean = sum(cost.forward_work.kernels.values()) if cost.strategy.kind == LEAN.kind else 0
    modules = () if cost.strategy.modules == ALL_AGAIN else cost.strategy.modules
    ways = [WAY_SECONDS.get(way.partition("+")[0], SLICED_SECONDS) for _, way in modules]
    forward, backward = (
        lean * of_operator + sum(of_ways) for of_operator, *of_ways in zip(LEAN_SECONDS, *ways, strict=True)
    )
    return replace(
        cost,
        discard_seconds=seconds(cost.discard_work, device, precision),
        forward_seconds=seconds(cost.forward_work, device, precision) + forward,
        backward_seconds=seconds(cost.backward_work, device, precision) + backward,
    )


def needed(
    costs: Sequence[StepCost], also: Collection[Strategy] = (), slack: float = 1.0
) -> tuple[StepCost, ...]:
    """Without those that another one is better than in all; `whole`, the first, stays.

    Args:
        also: strategies that stay, whatever is better.
        slack: of times, by which another one has to be better.
    """
    first, *others = costs
    kept = [first]
    for at, cost in enumerate(others, 1):
        before, after = costs[:at], costs[at + 1 :]
        if cost.strategy in also or (
            not any(_as_good(other, cost, slack) for other in before)
            and not any(_as_good(other, cost, slack) and not _as_good(cost, other) for other in after)
        ):
            kept.append(cost)
    return tuple(kept)


def _as_good(one: StepCost, other: StepCost, slack: float = 1.0) -> bool:
    return all(a <= b for a, b in zip(_bytes(one), _bytes(other), strict=True)) and all(
        slack * a <= b for a, b in zip(_seconds(one), _seconds(other), strict=True)
    )


def _bytes(cost: StepCost) -> tuple[int, ...]:
    memory = cost.forward_bytes, cost.preserved_bytes, cost.backward_bytes, cost.discard_bytes
    return *memory, max(cost.backward_bytes, cost.backward_held_bytes), len(cost.keeps_made)


def _seconds(cost: StepCost) -> tuple[float, ...]:
    return cost.discard_seconds, cost.forward_seconds, cost.backward_seconds
