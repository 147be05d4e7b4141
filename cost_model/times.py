"""Where times come from: the roofline, a calibrated roofline, or measurements kept in a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from evoplan.cost_model.devices import Device, Link
from evoplan.cost_model.roofline import seconds
from evoplan.cost_model.steps import Forward, StepCost, opaque_strategies
from evoplan.cost_model.times_cache import Shapes, TimesCache, Timing, key_of
from evoplan.cost_model.trace import Work
from evoplan.model.running.chain import Step
from evoplan.model.running.strategy import Strategy


class TimeSource(Protocol):
    """Puts times into costs."""

    @property
    def name(self) -> str:
        """What kind of times they are."""

    def knows(self, step: Step, shapes: Shapes, strategy: Strategy) -> bool:
        """Whether it has times of its own for a strategy.

        Args:
            shapes: of the state tensors that the step reads.
        """

    def timed(self, step: Step, shapes: Shapes, cost: StepCost) -> StepCost:
        """The cost with its times."""

    def opaque(self, step: Step, shapes: Shapes, live_bytes: int) -> list[StepCost]:
        """Costs of strategies that cannot be traced, where they were measured.

        Args:
            live_bytes: of the gradients that are live when the step's backward begins.
        """


@dataclass(frozen=True)
class Roofline:
    """Times from the work done and what the device can do."""

    device: Device
    dtype: str
    link: Link | None = None
    name: str = "roofline"

    def knows(self, step: Step, shapes: Shapes, strategy: Strategy) -> bool:
        """Every one."""
        return True

    def timed(self, step: Step, shapes: Shapes, cost: StepCost) -> StepCost:
        """The cost with its times."""
        return replace(
            cost,
            discard_seconds=seconds(cost.discard_work, self.device, self.dtype, self.link),
            forward_seconds=seconds(cost.forward_work, self.device, self.dtype, self.link),
            backward_seconds=seconds(cost.backward_work, self.device, self.dtype, self.link),
            unread=cost.unread
            and cost.unread._replace(seconds=seconds(cost.unread.work, self.device, self.dtype, self.link)),
        )

    def opaque(self, step: Step, shapes: Shapes, live_bytes: int) -> list[StepCost]:
        """None: nobody has measured them."""
        return []


def timed_as(cost: StepCost, found: Timing) -> StepCost:
    """The cost with times that were measured."""
    return replace(
        cost,
        discard_seconds=found.discard,
        forward_seconds=found.forward,
        backward_seconds=found.backward,
        unread=Forward(cost.ending.bytes, cost.ending.work, found.unread) if cost.ending else None,
    )


@dataclass(frozen=True)
class Measured:
    """Times that were measured on this device.

    Attributes:
        beside: times of `whole` where it was too large to be measured; baselines are made of it.
    """

    cache: TimesCache
    beside: Roofline
    name: str = "measured"

    def knows(self, step: Step, shapes: Shapes, strategy: Strategy) -> bool:
        """Those in the cache."""
        return self.cache.get(key_of(step, shapes, self.beside.dtype, strategy)) is not None

    def timed(self, step: Step, shapes: Shapes, cost: StepCost) -> StepCost:
        """The cost with its times."""
        found = self.cache.get(key_of(step, shapes, self.beside.dtype, cost.strategy))
        if found is None:
            return self.beside.timed(step, shapes, cost)
        return timed_as(cost, found)

    def opaque(self, step: Step, shapes: Shapes, live_bytes: int) -> list[StepCost]:
        """Those that were found to be exact here."""
        found = []
        for strategy in opaque_strategies(step, shapes[step.target], self.beside.device.kind):
            taken = self.cache.get_bytes(key_of(step, shapes, self.beside.dtype, strategy))
            if taken is not None:
                cost = StepCost(
                    strategy,
                    taken.forward,
                    taken.preserved,
                    taken.preserved + live_bytes + taken.vjp if step.submodule.training else 0,
                    taken.discard,
                    Work(),
                    Work(),
                    Work(),
                )
                found.append(self.timed(step, shapes, cost))
        return found
