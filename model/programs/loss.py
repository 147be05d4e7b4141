"""The loss by which plans are verified."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MeanSquare(torch.autograd.Function):
    """sum(x^2) / sqrt(count), with no temporary of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.count = count = count or 1  # of no entries
        # Over the root of the count, so that half-precision gradients do not vanish.
        root: float = count**0.5
        flat = x.flatten()
        # On a CPU a product of vectors in half precision may take 64 KiB of scratch per thread; a norm, none.
        squares = torch.linalg.vector_norm(flat).square() if x.itemsize == 2 else flat.dot(flat)
        return squares / root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / ctx.count**0.5)), None


def mean_square(*tensors: Tensor, counts: tuple[int, ...] | None = None) -> Tensor:
    """A loss whose gradient depends on every entry of some tensors.

    Args:
        counts: entries of the whole tensors where these are parts: the loss of the whole is the parts' sum.
    """
    counts = counts or tuple(tensor.numel() for tensor in tensors)
    terms: list[Tensor] = [
        _MeanSquare.apply(x, count)  # type: ignore[no-untyped-call]
        for x, count in zip(tensors, counts, strict=True)
    ]
    return sum(terms[1:], terms[0])
