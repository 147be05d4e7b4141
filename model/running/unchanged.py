"""What runs again in backward must find its tensors as forward had them. Whoever wrote into one is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from evoplan.model.running.internals import storage_key

Mark = tuple[int, int]  # how often a tensor was written into, and its storage


class ChangedError(RuntimeError):
    """A tensor that backward needs was written in place since forward; the message names it."""


def mark(name: str, tensor: Tensor) -> Mark:
    """What tells whether a tensor is still what it was.

    Raises:
        RuntimeError: it does not count how often it was written into.
    """
    if tensor.is_inference():
        raise RuntimeError(
            f"{name} was made under torch.inference_mode(), and cannot be kept for backward; "
            "use torch.no_grad() there, or pass a clone"
        )
    return tensor._version, storage_key(tensor)


def marks(named: Mapping[str, Tensor]) -> dict[str, Mark]:
    """Of several tensors by name."""
    return {name: mark(name, tensor) for name, tensor in named.items()}


def check(marked: Mapping[str, Mark], named: Mapping[str, Tensor], owner: str) -> None:
    """See that tensors are what they were when they were marked.

    Args:
        owner: of the tensors, in the message: the step that they are for.

    Raises:
        ChangedError: one of them is not.
    """
    for name, before in marked.items():
        if mark(name, named[name]) != before:
            raise changed(name, owner)


def changed(name: str, owner: str) -> ChangedError:
    """The error that names the tensor, and whose it is."""
    return ChangedError(
        f"{name} of {owner} was changed in place between forward and backward, which needs it as it was; "
        "change it after backward, or give the model a clone"
    )


def put_back(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Have tensors be what they were, given with each; those that are so are not written into.

    Not by their marks: a batch normalisation writes into its buffers and says nothing.
    """
    with torch.no_grad():
        for tensor, value in tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
