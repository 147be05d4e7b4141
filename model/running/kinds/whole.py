"""A run that autograd records as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from evoplan.model.running.affine import leaves_results_unread
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.runs import WholeRun, new_target
from evoplan.model.running.strategy import Kind, Record, Strategy
from evoplan.model.running.submodule import Submodule, Tensors


class Whole(Kind):
    """Keeps what autograd saves."""

    name = "whole"
    run: type[WholeRun] = WholeRun

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """Itself."""
        yield Strategy(self.name)

    def discarded(self, submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
        return new_target(strategy, submodule, tensors)

    def recorded(
        self,
        submodule: Submodule,
        strategy: Strategy,
        tensors: Tensors,
        wanted: Collection[str] | None,
        owner: str,
        parameters: Parameters | None,
        movable: bool = False,
        unread: bool = False,
    ) -> tuple[Record, Tensor | None]:
        unread = unread and leaves_results_unread(submodule)
        run = self.run(submodule, strategy, tensors, wanted, owner, parameters, unread, movable)
        return run, run.take_output()
