"""What two runs of a module have made, against one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Dtypes(TorchDispatchMode):
    """The coarsest precision that a module computes in."""

    coarsest = torch.finfo(torch.float64).eps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.coarsest = max(self.coarsest, torch.finfo(leaf.dtype).eps)
        return out


def common(found: Sequence[set[int] | None]) -> set[int] | None:
    """What holds for all parts that anything follows."""
    known = [dims for dims in found if dims is not None]
    return set.intersection(*known) if known else None


def confined(changed: Tensor, part: int, size: int) -> set[int] | None:
    """The dimensions of which only that part has changed; None if nothing has."""
    if not changed.any():
        return None
    found = set()
    for dim in range(changed.ndim):
        if changed.shape[dim] == size:
            others = [other for other in range(size) if other != part]
            if not changed.index_select(dim, torch.tensor(others)).any():
                found.add(dim)
    return found


def joined(pieces: Sequence[Tensor | None], dim: int | None) -> Tensor | None:
    """The gradient of a whole from those of slices, which are parts of it, or (None) terms."""
    present = [piece for piece in pieces if piece is not None]
    if len(present) < len(pieces):
        return present[0] if present and dim is None else None
    return sum(present[1:], start=present[0]) if dim is None else torch.cat(present, dim)


def largest_of(grad: Tensor | None) -> float:
    """The largest number in it, whatever its sign."""
    return 0.0 if grad is None or not grad.numel() else float(grad.abs().max())


def close_to(one: Tensor | None, other: Tensor | None, close: float, rounding: float = 0.0) -> bool:
    """Whether two are equal but for rounding, of the largest number and of so much more."""
    if one is None or other is None:
        return one is None and other is None
    if one.shape != other.shape or not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return False
    return not one.numel() or bool((one - other).abs().max() <= close * other.abs().max() + rounding)
