"""The loss by which plans are verified."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MeanSquare(torch.autograd.Function):
    """sum(x^2) / sqrt(numel), with no temporary of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Over the root of the count, so that half-precision gradients do not vanish.
        return torch.dot(x.flatten(), x.flatten()) / x.numel() ** 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / x.numel() ** 0.5))


def mean_square(m: Tensor, z: Tensor) -> Tensor:
    """A loss whose gradient depends on every entry of both streams. m [*, s, r, c_m], z [*, r, r, c_z]."""
    return _MeanSquare.apply(m) + _MeanSquare.apply(z)
