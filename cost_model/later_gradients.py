"""What follows a run in a model, as far as its backward sees it: gradients that come out of a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LaterGradients(torch.autograd.Function):
    """Makes gradients of what it is given, and holds them no longer than their readers do."""

    @classmethod
    def of(cls, made: Sequence[Tensor]) -> Tensor:
        """The root to differentiate."""
        root: Tensor = cls.apply(*made)  # type: ignore[no-untyped-call]
        return root

    @staticmethod
    def forward(ctx: Any, *made: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in made]
        return made[0].new_zeros((), dtype=made[0].dtype.to_real())  # as a root has to be

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=where) for shape, dtype, where in ctx.like)
