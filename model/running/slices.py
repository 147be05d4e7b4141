"""Slices of tensors by name, as pieces read and write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from evoplan.model.running.submodule import Submodule, Tensors


def cuts_of(submodule: Submodule, cuts: Mapping[str, int]) -> Mapping[str, int]:
    """`cuts`, and where the dropout mask is cut with the target unless it is shared along that axis."""
    dim = cuts[submodule.target]
    return cuts if submodule.dropout_shared_dim == dim else {**cuts, "dropout": dim}


def view(tensor: Tensor, dim: int, span: slice) -> Tensor:
    return tensor.narrow(dim, span.start, span.stop - span.start)


def cut(tensors: Tensors, cuts: Mapping[str, int], span: slice) -> dict[str, Tensor]:
    # Contiguous, so that a copy is made here, where it is counted, and not inside a kernel.
    return {
        name: view(tensor, cuts[name], span).contiguous() if name in cuts else tensor
        for name, tensor in tensors.items()
    }


def pick(tensors: Tensors, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names if name in tensors}


def put(new: Tensor, target: Tensor | None, update: Tensor) -> None:
    """Write the new target of a slice: the target and the update, or where none is added to, the latter."""
    if target is None:
        new.copy_(update)
    else:
        torch.add(target, update, out=new)


def buffer(target: Tensor, in_place: bool) -> Tensor:
    """Where pieces put the new target: over the old one, of which a piece reads its own slice only."""
    return target if in_place else torch.empty_like(target, memory_format=torch.contiguous_format)


def add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """The running sum of gradients; the first term becomes the buffer."""
    if total is None or term is None:
        return term if total is None else total
    return total.add_(term)
