"""The two-layer perceptrons at the end of each stream."""

from __future__ import annotations

from torch import Tensor, nn

from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.in_place import relu_over
from evoplan.model.running.internals import has_hooks
from evoplan.model.running.layers import FULL, last_columns, rows
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end


class Transition(Submodule):
    """relu(x W1 + b1) W2 + b2 on every position of one stream.

    Source: Jumper et al. (2021), Suppl. Alg. 9 and 15.
    """

    layout = ALPHAFOLD
    positionwise = True

    def __init__(self, target: str, c: int, factor: int, axis: str) -> None:
        super().__init__()
        self.target = target
        self.piece_inputs = (target,)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(c)})
        self.linear_1 = nn.Linear(c, factor * c)
        self.linear_2 = nn.Linear(factor * c, c)
        self.axes = (self.along(axis), ReductionAxis("channel", factor * c))

    @affine_at_the_end
    def piece(self, x: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        # Two-dimensional, so that the product is no view and relu can write into it.
        hidden = rows(self.linear_1, x.flatten(0, -2), part)
        hidden = hidden.relu() if has_hooks(self.linear_1) else relu_over(hidden)
        return last_columns(self.linear_2, hidden.unflatten(0, x.shape[:-1]), part)
