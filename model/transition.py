"""The two-layer perceptrons at the end of each stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from evoplan.model.submodule import FULL, IndependentAxis, ReductionAxis, Submodule


class Transition(Submodule):
    """relu(x W1 + b1) W2 + b2 on every position of one stream.

    Source: Jumper et al. (2021), Suppl. Alg. 9 and 15.
    """

    positionwise = True

    def __init__(self, target: str, c: int, factor: int, axis: str) -> None:
        super().__init__()
        self.target = target
        self.piece_inputs = (target,)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(c)})
        self.linear_1 = nn.Linear(c, factor * c)
        self.linear_2 = nn.Linear(factor * c, c)
        self.axes = (IndependentAxis(axis, {target: -3}), ReductionAxis("channel", factor * c))

    def piece(self, x: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        # Two-dimensional, so that the product is no view and relu can write into it.
        hidden = F.linear(x.flatten(0, -2), self.linear_1.weight[part], self.linear_1.bias[part]).relu_()
        return F.linear(hidden.unflatten(0, x.shape[:-1]), self.linear_2.weight[:, part])

    def finish(self, update: Tensor) -> Tensor:
        return update.add_(self.linear_2.bias)
