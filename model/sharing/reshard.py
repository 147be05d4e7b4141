"""What a rank's share of a model has besides: shared work, and moves of the state between shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evoplan.model.running.submodule import Layout, Submodule, Tensors
from evoplan.model.sharing.ranks import Exchange, Gather, Ranks


@dataclass(frozen=True)
class SharedWork:
    """What a submodule is told about its ranks (`model.running.submodule.Sharding`).

    Attributes:
        cut, size: the dimension along which its target is cut, and how long the whole is there.
        context_dim, context_size: where contexts are joined, and how long the whole is there.
    """

    ranks: Ranks
    cut: int
    size: int
    context_dim: int = -1
    context_size: int = 0

    def gather(self, context: Tensor) -> Tensor:
        """The whole context from every rank's; differentiable."""
        size = self.context_size
        whole: Tensor = Gather.apply(  # type: ignore[no-untyped-call]
            self.ranks, context, self.context_dim, size
        )
        return whole

    def reduce(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's context from all ranks' gradients of the whole."""
        return self.ranks.sum_own(grad, self.context_dim)

    def whole_shape(self, target: Tensor) -> list[int]:
        """The shape of the tensor that `target` is this rank's shard of."""
        shape = list(target.shape)
        shape[self.cut] = self.size
        return shape

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a mask of the target's layout; one shared along the cut is every rank's."""
        return whole if whole.shape[self.cut] == 1 else self.ranks.own(whole, self.cut)


class Reshard(Submodule):
    """Moves one tensor of the state from shards along one dimension to shards along another (all-to-all).

    Args:
        target: the tensor, as its block calls it; `layout` has its dimensions.
        cut, new_cut: dimensions from the right; `size` is how long the whole is along `cut`.
    """

    axes = ()
    leads_in = True

    def __init__(self, target: str, layout: Layout, ranks: Ranks, cut: int, new_cut: int, size: int) -> None:
        super().__init__()
        self.layout, self.target, self.piece_inputs = layout, target, (target,)
        self.norms = nn.ModuleDict()
        self.ranks, self.move = ranks, (cut, new_cut, size)

    def new_target(self, tensors: Tensors) -> Tensor:
        target = tensors[self.target]
        new: Tensor = Exchange.apply(self.ranks, target, *self.move)  # type: ignore[no-untyped-call]
        return new

    def new_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        cut, new_cut, size = self.move
        new = list(shape)
        new[cut], new[new_cut] = size, self.ranks.lengths(shape[new_cut])[self.ranks.rank]
        return tuple(new)

    @property
    def shared_by(self) -> str:
        return repr(self.ranks)

    def signature(self) -> tuple[Any, ...]:
        kind, *about = super().signature()
        return kind, self.target, self.move, *about
