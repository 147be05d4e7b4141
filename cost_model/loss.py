"""What a user's own loss takes: its peak, gradients of the chain's results included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.fakes import real_tensors_too
from evoplan.cost_model.trace import Trace

# Takes what forward returns, and returns a scalar.
Loss = Callable[[Any], Tensor]


def trace_loss(loss: Loss, results: tuple[Tensor, ...], trace: Trace, casting: Casting) -> int:
    """Most bytes that the loss and its backward to `results` take above them; call inside `trace`.

    Args:
        results: without data.
        casting: what forward runs under.

    Raises:
        ValueError: the loss is no scalar, or it looks at the values of tensors.
    """
    results = tuple(tensor.detach().requires_grad_() for tensor in results)
    base = trace.live_bytes
    trace.reset()
    try:
        with casting(), real_tensors_too():
            value = loss(results)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("the loss must return one number as a tensor; take a mean or a sum")
        if value.requires_grad:
            torch.autograd.grad(value, results, allow_unused=True)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the loss needs values of tensors, of which a plan knows none ({error}); plan without it, and "
            "keep room for it with reserve="
        ) from None
    return trace.peak_bytes - base
