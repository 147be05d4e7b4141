"""What a tape asks of the steps that it runs: where they are in a chain, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from evoplan.model.running.chain import State
from evoplan.model.running.strategy import Record, Strategy
from evoplan.planner.schedules.schedule import Action

Outputs = tuple[Tensor, ...]


class Placed(Protocol):
    """A step at its place in a chain: it reads tensors of the state, and makes or rewrites some."""

    @property
    def index(self) -> int:
        """Position in the chain."""

    @property
    def name(self) -> str:
        """By which reports and errors call it."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The state tensors that it reads."""

    @property
    def makes(self) -> tuple[str, ...]:
        """The state tensors that it makes or rewrites."""


class Met(Protocol):
    """A step as forward met it."""

    @property
    def differentiable(self) -> bool:
        """Whether there is a gradient to find at all."""


SomeStep = TypeVar("SomeStep", bound=Placed)


class Runs(Protocol[SomeStep]):
    """How the steps of a chain run, in one forward and its backward."""

    @property
    def met(self) -> Mapping[int, Met]:
        """The steps that forward has come by, by index."""

    def run(
        self, step: SomeStep, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs]:
        """Run a step: its record, if it is to be kept and there is a gradient to find, and what it makes."""

    def closed(self, step: SomeStep, made: Outputs) -> Iterable[Tensor]:
        """Of what a step has made, what no gradient goes through."""

    def again(
        self, step: SomeStep, action: Action, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs | None]:
        """Run it once more as forward met it; None made where nobody reads it and its record does without."""

    def vjp(self, step: SomeStep, kept: Record, grads: Any, keep: bool) -> tuple[Tensor | None, ...]:
        """Gradients of the step's inputs from those of what it made."""

    def check(self, step: SomeStep) -> None:
        """See that nobody has written into what a step needs besides the state."""

    def walk(
        self, steps: Iterable[SomeStep], state: State, perform: Callable[[SomeStep, State], None]
    ) -> None:
        """Perform steps one after the other in a redo, under forward's context."""
