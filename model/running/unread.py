"""Products whose result no backward reads, left out of what runs again for its backward alone.

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

from evoplan.model.running.internals import own_view

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
    """Inside, what updates make is differentiated, and not read."""
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
    """A tensor in the place of x W^T + b: its numbers are any, its backward is that of the product.

    It keeps what the product keeps, and its backward takes as much.
    """
    made: Tensor = _Unread.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return own_view(made, (*x.shape[:-1], weight.shape[0]))


class _Unread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_rows, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return rows.new_empty((len(rows), len(weight)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad @ weight if of_rows else None,
            grad.t() @ rows if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
