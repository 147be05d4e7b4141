"""What kinds that run in pieces have in common: they keep the submodule's input and nothing else."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from evoplan.model.running.kernels import using
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.runs import PiecewiseRun
from evoplan.model.running.strategy import Kind, Record, Strategy
from evoplan.model.running.submodule import Submodule, Tensors


class InPieces(Kind):
    """Base of the kinds that record nothing: forward is the discarding run, backward recomputes each piece.

    Attributes:
        run: whose `product` that is.
    """

    run: type[PiecewiseRun]

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
        kept = self.run(submodule, strategy, tensors, wanted, owner, parameters)
        if unread:
            return kept, None
        with torch.no_grad(), using(strategy.kernel):
            return kept, self.discarded(submodule, strategy, kept.tensors, in_place=False)
