"""Products whose result no backward reads, left out where a piece runs again for its backward alone.

The last product of an attention or a transition is a good part of its arithmetic. Its backward reads what
went into it; and where all that follows is affine - a transposition, a dropout mask, a division by counts -
nobody reads what it made. torch.utils.checkpoint stops a rerun early for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

Stage = TypeVar("Stage", bound=Callable[..., Any])

_unread: ContextVar[bool] = ContextVar("unread", default=False)


def affine_at_the_end(stage: Stage) -> Stage:
    """Of a stage: after its `last_columns`, or on all that it is given, it is affine.

    Said of a function, not of a class: a subclass that has another stage has not said so.
    """
    stage.affine_at_the_end = True  # type: ignore[attr-defined]
    return stage


def is_affine_at_the_end(stage: Callable[..., Any]) -> bool:
    """Whether that was said of a stage."""
    return getattr(stage, "affine_at_the_end", False)


@contextmanager
def results_unread() -> Iterator[None]:
    """Inside, what pieces make is differentiated, and not read."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def is_unread(x: Tensor) -> bool:
    """Whether the result of a product of `x` is not wanted; autocast, which casts operands, makes it so."""
    if torch.compiler.is_compiling() or not (_unread.get() and torch.is_grad_enabled()):
        return False
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)


def unread_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A tensor in the place of x W^T + b: its numbers are any, its backward is that of the product."""
    made: Tensor = _Unread.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made


class _Unread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            (rows @ weight).view(x.shape) if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
