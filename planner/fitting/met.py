"""Calls of blocks as a forward meets them, and the blocks as they were before they were planned."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from torch import Tensor, nn

from evoplan.model.foreign.attributes import Attributes, values_of
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.fingerprints import Fingerprint
from evoplan.model.foreign.inside import Forward
from evoplan.model.running.context import Context
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import Mark, mark


@dataclass
class MetCall:
    """A call as forward met it.

    Attributes:
        given: leaves of its arguments; None in place of what comes from the state.
        wanted: positions of those that a gradient is wanted of.
        twins: positions of those that are the same object as an earlier one, and its position.
        context: what the call runs under.
        marks: of the tensors among `given`.
        attributes: flags and numbers of its modules, as they were before.
        buffers: values of those that it writes into, as they were before.
        others: its other buffers, and `of_others` their marks.
        values: of the others, where no forward in these modes has shown that it leaves them alone.
        plain: marks of what else it reads that its modules have in attributes.
        random: where the generators stood; None where it has drawn nothing.
        returned: what it returned and did not make, until the caller has it.
        fingerprint: of what it made, where it will run again.
        closed: places of what it made that no gradient goes through.
    """

    given: list[Any]
    wanted: tuple[int, ...]
    twins: dict[int, int]
    parameters: Parameters
    context: Context
    marks: dict[str, Mark]
    attributes: Attributes
    buffers: dict[str, Tensor]
    others: dict[str, Tensor]
    of_others: dict[str, Mark]
    plain: dict[str, Mark]
    random: RandomState | None
    values: dict[str, Any] = field(default_factory=dict)
    returned: list[Any] = field(default_factory=list)
    fingerprint: Fingerprint = ()
    closed: tuple[int, ...] = ()

    @property
    def differentiable(self) -> bool:
        """Whether there is a gradient to find at all."""
        return bool(self.wanted or self.parameters.trained)

    def has_run(self, call: Call, block: Planned) -> None:
        """See that a forward has done no more than was planned.

        Raises:
            ValueError: it has.
        """
        if self.random is not None and not self.random.moved():
            self.random = None
        if self.random is not None and not call.draws:
            raise ValueError(
                f"{call.name} draws random numbers, as it did not when the plan was made, or another thread "
                "has drawn; fit the model again, and have it draw with torch's default generator"
            )
        now = {name: block.module.get_buffer(name) for name in self.others}
        values, self.values = self.values, {}
        found = values_of(now) if values else {}
        for name, then in self.of_others.items():
            if mark(name, now[name]) != then or found.get(name) != values.get(name):
                block.modes.clear()
                raise ValueError(
                    f"{name} of {call.name} has changed in a forward, as it did not when the plan was made; "
                    "fit the model again, in the mode that it is trained in"
                )


@dataclass(frozen=True)
class Planned:
    """A block and its own forward, as it was before it was planned.

    Attributes:
        lock: of the model: one thread at a time runs a block, or patches it.
        tried: strategies that have been seen to repeat what modules within do.
        modes: those of its modules that have buffers, of forwards that were seen to write into no others than
            planned: kernels, and writes through `.data`, count nothing.
    """

    module: nn.Module
    forward: Forward
    lock: AbstractContextManager[object] = field(default_factory=RLock)
    tried: set[Strategy] = field(default_factory=set)
    modes: set[tuple[bool, ...]] = field(default_factory=set)
