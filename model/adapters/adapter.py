"""How a module of somebody else's is a submodule of ours: whose layers are whose, which tensor is which."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from evoplan.model.running.internals import on_meta
from evoplan.model.running.submodule import Submodule, Tensors

Layers = Mapping[str, str]  # ours: theirs, by path
Make = Callable[[], Submodule]  # makes it new, with any parameters


@dataclass(frozen=True)
class Adapted:
    """A call of a module, as one of our submodule.

    Attributes:
        submodule: has the module's own layers and adds nothing to its target.
        tensors: what its stages read, by our names. The target is there for its shape where none reads it.
        result: from our new target to what the module returns.
    """

    submodule: Submodule
    tensors: Tensors
    result: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """What a module is asked for.

    Attributes:
        kind: what distinguishes our submodules for it, such as the direction of edges and the widths.
        tensors, result: as `Adapted` has them.
    """

    kind: tuple[Any, ...]
    tensors: Tensors
    result: Callable[[Tensor], Tensor] = lambda new: new


@dataclass(frozen=True)
class Adapter:
    """How the modules of a class are submodules of ours.

    Attributes:
        module, name: of the class.
        make: our submodule for a call's kind.
        layers: its layers: the module's, by path.
        call: what a call asks for, given the module and the arguments by name; None: something else than our
            submodule computes.
    """

    module: str
    name: str
    make: Callable[..., Submodule]
    layers: Layers
    call: Callable[..., Call | None]

    def adapted(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Adapted | None:
        """A call of a module of the class; None where it asks for something else."""
        try:
            bound = _signature(type(module).forward).bind(module, *args, **kwargs)
        except TypeError:  # another release's
            return None
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        call = self.call(module, **dict(given))
        if call is None:
            return None
        made = _made(self.make, call.kind)
        if any(call.tensors[name].requires_grad for name in made.constants):
            return None  # of masks there are no gradients
        try:
            layers = {ours: module.get_submodule(theirs) for ours, theirs in self.layers.items()}
        except AttributeError:  # an attention without a gate
            return None
        return Adapted(_with_layers(made, layers), call.tensors, call.result)


_ADAPTERS: dict[tuple[str, str], Adapter] = {}


def register(*adapters: Adapter) -> None:
    """Make adapters known; the last one of a class is asked."""
    _ADAPTERS.update({(adapter.module, adapter.name): adapter for adapter in adapters})


def adapter_of(module: nn.Module) -> Adapter | None:
    """That of the module's class itself: a subclass may do otherwise."""
    return _ADAPTERS.get((type(module).__module__, type(module).__qualname__))


def adapters_in(model: nn.Module) -> list[Adapter]:
    """Those of all modules of a model, each once."""
    found = {id(adapter): adapter for adapter in map(adapter_of, model.modules()) if adapter is not None}
    return list(found.values())


_signature = cache(inspect.signature)


@cache
def _made(make: Callable[..., Submodule], kind: tuple[Any, ...]) -> Submodule:
    with on_meta():
        made = make(*kind)
    made.residual = False
    return made


def _with_layers(own: Any, layers: Mapping[str, nn.Module], path: str = "") -> Any:
    """A module of ours that calls these layers, by path in it; `own` stays as it is."""
    new = copy.copy(own)
    new.__dict__["_modules"] = {
        name: layers[path + name] if path + name in layers else _with_layers(child, layers, f"{path}{name}.")
        for name, child in own._modules.items()
        if child is not None
    } | {name: None for name, child in own._modules.items() if child is None}
    return new
