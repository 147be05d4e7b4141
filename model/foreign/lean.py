"""Keeping less of a block that somebody else wrote: which results are cheap to make again, operators tell.

Matrix products, attention, convolutions, softmaxes and what is random are kept. Of what is made from them
element by element, of copies and of normalisations, the operator is kept and what it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.model.foreign.writes import written
from evoplan.model.running.context import Context
from evoplan.model.running.internals import storage_key
from evoplan.model.running.remake import Remaking

_as_written: ContextVar[bool] = ContextVar("as_written", default=False)
_aten = torch.ops.aten
_NORM = _aten.native_layer_norm.default
_COPIES = {_aten.clone.default, _aten._to_copy.default}


@contextmanager
def remaking_operators() -> Iterator[None]:
    """While installed, autograd keeps recipes in place of what operators made cheaply."""
    with Remaking(Context()) as remaking, _Operators(remaking):
        yield


@contextmanager
def as_written() -> Iterator[None]:
    """Inside `remaking_operators`, what runs here is kept as it is: something else decides on it."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


class _Operators(TorchDispatchMode):
    def __init__(self, remaking: Remaking) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.remaking = remaking

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            self.remaking.writes(storage_key(tensor))
        out = func(*args, **kwargs)
        if not _is_cheap(func) or _as_written.get():
            return out
        made = out[0] if func is _NORM else out
        leaves, structure = pytree.tree_flatten((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not isinstance(made, Tensor) or storage_key(made) in set(map(storage_key, read)):
            return out
        # Something small that is made of much is worth more than what it is made of.
        if made.nbytes >= max((tensor.nbytes for tensor in read), default=0):
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            self.remaking.ran(made, partial(_again, func, rest, places, structure), read)
        return out


def _again(func: Any, rest: list[Any], places: list[int], structure: Any, *tensors: Tensor) -> Tensor:
    leaves = list(rest)
    for at, tensor in zip(places, tensors, strict=True):
        leaves[at] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    out = func(*args, **kwargs)
    made: Tensor = out[0] if func is _NORM else out
    return made


def _is_cheap(func: Any) -> bool:
    if func is _NORM or func in _COPIES:
        return True
    tags = func.tags
    return (
        torch.Tag.pointwise in tags
        and torch.Tag.nondeterministic_seeded not in tags
        and not func._schema.is_mutable
    )
