"""A run that autograd records as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from evoplan.model.running.affine import leaves_results_unread
from evoplan.model.running.internals import has_saving_hooks
from evoplan.model.running.kernels import using
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.remake import Keeping
from evoplan.model.running.runs import WholeRun, new_target
from evoplan.model.running.strategy import Kind, Record, Strategy
from evoplan.model.running.submodule import Submodule, Tensors
from evoplan.model.running.unchanged import marks


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

    def written(
        self, submodule: Submodule, strategy: Strategy, tensors: Tensors, owner: str
    ) -> tuple[Keeping | None, Tensor]:
        """What autograd's own graph keeps of a run, where it can be let go of, and the new target."""
        read = {name: tensors[name].detach() for name in (*submodule.reads, *submodule.constants)}
        marks(read)
        with torch.enable_grad(), using(strategy.kernel), self.keeping(submodule, owner, read) as kept:
            return kept, new_target(strategy, submodule, tensors)

    def keeping(
        self, submodule: Submodule, owner: str, read: Tensors
    ) -> AbstractContextManager[Keeping | None]:
        """What such a run is within; something around the model may keep what is saved in its own way."""
        if has_saving_hooks():
            return nullcontext()
        return Keeping(owner, lambda: {**read, **dict(submodule.named_parameters())})
