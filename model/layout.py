"""Channels last, as the layers read them, or first, as batched matrix products do; gradients alike.

A copy of a moved view has a gradient that autograd hands on as a view moved back: whatever follows reads
it across memory, or copies it again for each product. Here the gradient is laid out anew, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """[*, i, j, c] to [*, c, i, j], in a tensor of its own."""
    return _Moved.apply(x, -1, -3)


def channels_last(x: Tensor) -> Tensor:
    """[*, c, i, j] to [*, i, j, c], in a tensor of its own."""
    return _Moved.apply(x, -3, -1)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: int, destination: int) -> Tensor:
        ctx.dims = source, destination
        return x.movedim(source, destination).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source, destination = ctx.dims
        return _Moved.apply(grad, destination, source), None, None
