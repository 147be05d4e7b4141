"""A whole run of which backward makes again what is cheap to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from evoplan.model.running.context import Context
from evoplan.model.running.kinds.whole import Whole
from evoplan.model.running.remake import Remaking
from evoplan.model.running.runs import WholeRun
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule


class LeanRun(WholeRun):
    """Remembers how cheap tensors were made in their place (`model.running.remake`)."""

    def keeping(self, movable: bool) -> AbstractContextManager[object]:
        return Remaking(Context.of_steps())

    def as_forward(self) -> AbstractContextManager[object]:
        return self.parameters.installed()  # recipes call normalisations

    def check(self) -> None:
        self.parameters.check(self.owner)


class Lean(Whole):
    """Keeps of what autograd saves what is expensive to make again."""

    name = "lean"
    run = LeanRun
    pays_in_inference = False

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """Itself, but where there is no normalisation (a reshard), and so nothing that could be remade."""
        if submodule.norms:
            yield Strategy(self.name)
