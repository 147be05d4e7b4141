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
    return _moved(x, -1, -3)


def channels_last(x: Tensor) -> Tensor:
    """[*, c, i, j] to [*, i, j, c], in a tensor of its own."""
    return _moved(x, -3, -1)


def _moved(x: Tensor, source: int, destination: int) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler lays gradients out itself, and takes no rule of ours
        return x.movedim(source, destination).contiguous()
    moved: Tensor = _Moved.apply(x, source, destination)  # type: ignore[no-untyped-call]
    return moved


class _Moved(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: int, destination: int) -> Tensor:
        return x.movedim(source, destination).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, *ctx.dims = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source, destination = ctx.dims
        return _moved(grad, destination, source), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _moved(tangent, *ctx.dims)
