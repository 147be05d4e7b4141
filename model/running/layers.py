"""Linear layers run whole, by their outputs or by their inputs.

A layer of torch's own is read for its weight, of which a co-shard wants a slice. One that somebody has put in
its place (a low-rank adapter, a quantised layer) or hung something on is called: only it knows what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from evoplan.model.running.in_place import add_over
from evoplan.model.running.internals import has_hooks, is_plain, is_tracked, members
from evoplan.model.running.unread import is_unread, unread_product

FULL = slice(None)
_NEVER_CALLED = (nn.ModuleDict, nn.ModuleList)


class AlteredLayerError(ValueError):
    """A slice is wanted of a layer that only knows itself what it does; says which and what to do."""


def rows(layer: nn.Module, x: Tensor, part: slice = FULL, scale: float | None = None) -> Tensor:
    """layer(x), or of its outputs those in `part`: x W[part]^T + b[part], times `scale` if there is one."""
    if _is_called(layer, part):
        out: Tensor = layer(_whole(layer, part, x))
        return out if scale is None else out * scale
    assert isinstance(layer, nn.Linear)
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if part != FULL:
        weight, bias = weight[part], None if bias is None else bias[part]
    if scale is None:
        return F.linear(x, weight, bias)
    # Into the weights: they are smaller than what they make.
    return F.linear(x, weight * scale, None if bias is None else bias * scale)


def columns(layer: nn.Module, x: Tensor, part: slice = FULL) -> Tensor:
    """layer(x) where x has all inputs; else what its inputs `part` contribute, the bias with the first.

    Returns:
        A tensor that may be written into.
    """
    if _is_called(layer, part):
        out: Tensor = layer(_whole(layer, part, x))
        return out.clone() if has_hooks(layer) else out  # whoever hangs on the layer may keep what it saw
    assert isinstance(layer, nn.Linear)
    # A product without bias is no view: what is written into it costs autograd nothing.
    out = F.linear(x, layer.weight if part == FULL else layer.weight[:, part])
    return out if layer.bias is None or part.start else add_over(out, layer.bias)


def last_columns(layer: nn.Module, x: Tensor, part: slice = FULL) -> Tensor:
    """`columns`, where all that follows is affine: not made where only its backward is wanted."""
    if not (is_unread(x) and _is_plain_linear(layer)):
        return columns(layer, x, part)
    weight = layer.weight if part == FULL else layer.weight[:, part]
    return unread_product(x, weight, None if part.start else layer.bias)


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return is_plain(layer, nn.Linear)


def _is_called(layer: nn.Module, part: slice) -> bool:
    """Whether a layer runs as it would by itself: somebody else's, or all of one whose runs are noted."""
    return not _is_plain_linear(layer) or (part == FULL and is_tracked())


def _whole(layer: nn.Module, part: slice, x: Tensor) -> Tensor:
    if part == FULL:
        return x
    raise AlteredLayerError(
        f"a slice is wanted of the weight of a layer that is called ({type(layer).__name__})"
    )


def times(part: slice, width: int) -> slice:
    """The indices of those groups of `width`: of heads, say, their channels."""
    return part if part == FULL else slice(part.start * width, part.stop * width)


def altered_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers of a module that are not what evoplan's models are made of."""
    for child in members(module).modules:
        own = type(child).__module__.startswith("evoplan.") or type(child) is nn.Sequential
        known = is_plain(child, nn.Linear) or is_plain(child, nn.LayerNorm) or (own and not has_hooks(child))
        if child is not module and type(child) not in _NEVER_CALLED and not known:
            yield next(name for name, inner in module.named_modules() if inner is child), child
