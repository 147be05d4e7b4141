"""Writing over a temporary, where nobody else will want to read it.

The maths writes over what it has just made: a product's result becomes the logits with their biases, an
update the new state. Autograd has no need of the old values, so that costs nothing and saves a tensor.
Selective checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) keeps results of
operators to give them back when forward runs again: written over, they are no longer what the operator made.
While such a checkpoint is at work, here as everywhere it runs, the same results come in tensors of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evoplan.model.running.internals import keeps_results


def _may_write() -> bool:
    # A compiler sees operators without side effects whatever is written here.
    return torch.compiler.is_compiling() or not keeps_results()


def add_over(x: Tensor, y: Tensor) -> Tensor:
    """x + y in the dtype of x; may be x itself."""
    return x.add_(y) if _may_write() else (x + y).to(x.dtype)


def multiply_over(x: Tensor, y: Tensor | float) -> Tensor:
    """x * y in the dtype of x; may be x itself."""
    return x.mul_(y) if _may_write() else (x * y).to(x.dtype)


def divide_over(x: Tensor, y: Tensor) -> Tensor:
    """x / y in the dtype of x; may be x itself."""
    return x.div_(y) if _may_write() else (x / y).to(x.dtype)


def relu_over(x: Tensor) -> Tensor:
    """max(x, 0); may be x itself."""
    return x.relu_() if _may_write() else x.relu()
