"""What somebody else's code is run on, so that it is afterwards what it was: a model, and arguments."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from evoplan.model.foreign.obstacles import PLAIN
from evoplan.model.running.internals import parametrizations_made_anew
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.unchanged import put_back

Held = dict[Any, Any] | list[Any] | set[Any]
_HOLDING = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def left_as_it_is(model: nn.Module, but: set[nn.Module] | None = None) -> Iterator[None]:
    """A model's buffers and attributes, what lists and dictionaries among these hold, and generators as they
    are now, afterwards.

    Args:
        but: modules whose attributes are left as they have become, unless there is an error.
    """
    random = RandomState()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    attributes = {module: _contents(module.__dict__) for module in model.modules()}
    try:
        with random, parametrizations_made_anew():
            yield
    except BaseException:
        but = set()
        raise
    finally:
        for module, contents in attributes.items():
            if module not in (but or ()):
                _put(contents)
        put_back(buffers)


def _contents(held: Held) -> list[tuple[Held, Held]]:
    """A dictionary with what it holds, and those within it."""
    found: dict[int, tuple[Held, Held]] = {}
    todo = [held]
    while todo:
        held = todo.pop()
        if id(held) not in found:
            kind = dict if isinstance(held, dict) else type(held)
            found[id(held)] = held, kind(held)
            inner = held.values() if isinstance(held, dict) else held
            todo += [value for value in inner if type(value) in _HOLDING]
    return list(found.values())


def _put(contents: list[tuple[Held, Held]]) -> None:
    for held, then in contents:
        if len(held) == len(then) and all(map(is_, _flat(held), _flat(then))):
            continue  # nothing has changed: nearly always
        held.clear()
        if isinstance(held, list):
            held += then
        else:
            held.update(then)


def _flat(held: Held) -> list[Any]:
    return [*held, *held.values()] if isinstance(held, dict) else list(held)


def own_copies(arguments: Any) -> Any:
    """Arguments that may be written into, emptied and added to: tensors are copied, objects as far as that
    can be.
    """
    return _others(arguments, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def own_objects(arguments: Any) -> Any:
    """The same with the tensors as they are."""
    return _others(arguments, lambda tensor: tensor)


def _others(arguments: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def own(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), (of_tensor(tensor), tensor))[0]

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return own(leaf)
        if isinstance(leaf, PLAIN):
            return leaf
        try:
            with _Tensors(own):
                return copy.deepcopy(leaf)
        except Exception:  # somebody else's object, such as an open file
            return leaf

    return pytree.tree_map(other, arguments)


class _Tensors(TorchFunctionMode):
    """Deep copies have these in place of tensors."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            with torch._C.DisableTorchFunction():
                return self.own(args[0])
        return func(*args, **(kwargs or {}))
