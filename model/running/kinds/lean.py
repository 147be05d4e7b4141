"""A whole run of which backward makes again what is cheap to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from evoplan.model.running.context import Context
from evoplan.model.running.kinds.whole import Whole
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.remake import Keeping, Remaking
from evoplan.model.running.runs import WholeRun
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule, Tensors


class LeanRun(WholeRun):
    """Remembers how cheap tensors were made in their place (`model.running.remake`)."""

    def keeping(self, movable: bool) -> AbstractContextManager[object]:
        return Remaking(Context.of_steps())

    def as_forward(self) -> AbstractContextManager[object]:
        return self.parameters.installed()  # recipes call normalisations

    def check(self) -> None:
        self.parameters.check(self.owner)


class _AsForward(AbstractContextManager[None]):
    """A forward's settings and parameters in force again, as often as it is entered."""

    def __init__(self, parameters: Parameters, owner: str) -> None:
        self.parameters, self.owner, self.context = parameters, owner, Context.of_steps()
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        self.parameters.check(self.owner)
        with ExitStack() as stack:
            stack.enter_context(self.context)
            stack.enter_context(self.parameters.installed())
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class Lean(Whole):
    """Keeps of what autograd saves what is expensive to make again."""

    name = "lean"
    run = LeanRun
    pays_in_inference = False

    def keeping(
        self, submodule: Submodule, owner: str, read: Tensors
    ) -> AbstractContextManager[Keeping | None]:
        parameters = Parameters(submodule)
        return Remaking(_AsForward(parameters, owner), owner, lambda: {**read, **parameters.all})

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """Itself, but where there is no normalisation (a reshard), and so nothing that could be remade."""
        if submodule.norms:
            yield Strategy(self.name)
