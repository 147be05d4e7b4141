"""What modules keep besides tensors - flags, numbers, generators - as one forward found it."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.fingerprints import fingerprint
from evoplan.model.running.internals import has_data, storage_key
from evoplan.model.running.unchanged import Mark

_NONE = object()
_PLAIN = (bool, int, float, complex, str, type(None))
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_NOT_COPIED = (*_GENERATORS, Tensor)


class Attributes:
    """Plain attributes and generators of a block's modules as they are now.

    The mode (`training`) among them. A block may be run in one mode and differentiated in another, count its
    own calls, or be given another number for the next forward: inside `installed` it is as it was.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._found = [(own.__dict__, _copy(own.__dict__)) for own in modules]

    def put(self) -> None:
        """Have the modules have these attributes from now on."""
        for own, then in self._found:
            _put(own, then)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The modules with these attributes; afterwards with those that they have now."""
        present = [(own, _copy(own)) for own, _ in self._found]
        self.put()
        try:
            yield
        finally:
            for own, now in present:
                _put(own, now)


def _copy(own: dict[str, Any]) -> dict[str, Any]:
    """What a module has, but for tensors, which are not to be held here; generators as they stand."""
    if any(issubclass(kind, _NOT_COPIED) for kind in set(map(type, own.values()))):
        found = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
        return {name: _as_it_is(value) for name, value in found.items()}
    return own.copy()


def _put(own: dict[str, Any], then: dict[str, Any]) -> None:
    """Have a module's plain attributes and generators be what they were."""
    if own.keys() == then.keys() and all(map(is_, own.values(), then.values())):
        return  # nothing has changed: nearly always
    for name in [name for name, value in own.items() if _is_kept(name, value) and name not in then]:
        del own[name]  # it has come since: a class has one of that name, or will have made it anew
    kept = {name: _as_it_is(value) for name, value in then.items() if _is_kept(name, value)}
    own.update({name: value for name, value in kept.items() if own.get(name, _NONE) is not value})


class Settings:
    """What decides, besides its parameters, what a block does: classes of its modules, what they have in
    their attributes, and the values of buffers.
    """

    def __init__(self, block: nn.Module | None = None) -> None:
        named = [] if block is None else list(block.named_modules(remove_duplicate=False))
        self._of = {path: settings_of(module) for path, module in named}
        buffers = () if block is None else _buffers(block)
        self._marks = {path: (mark_of(buffer), _values(buffer)) for path, buffer in buffers}

    def hold(self, path: str, module: nn.Module) -> bool:
        """Whether they are still those of the module of a path in it, and of all in that."""
        of_module = module.named_modules(remove_duplicate=False)
        return all(
            self._of.get(f"{path}.{name}".strip(".")) == settings_of(inner) for name, inner in of_module
        ) and all(self._has(f"{path}.{name}".strip("."), buffer) for name, buffer in _buffers(module))

    def _has(self, path: str, buffer: Tensor) -> bool:
        """Whether a buffer has the values that it had: a snapshot that is read back writes them anew."""
        mark, (then, values) = mark_of(buffer), self._marks.get(path, (None, None))
        if mark != then:
            if values is None or _values(buffer) != values:
                return False
            self._marks[path] = mark, values  # so that they are looked at once
        return True


def settings_of(module: nn.Module) -> tuple[type, Any, dict[str, Any]]:
    """Of one module, without those that it has in it; its class may have got another forward."""
    own = {name: value for name, value in module.__dict__.items() if name not in OF_TORCH}
    return type(module), type(module).forward, {name: _said(value) for name, value in own.items()}


OF_TORCH = (nn.Module().__dict__.keys() - {"training"}) | {"forward"}
_LOOKED_AT = (
    2**20
)  # bytes of a buffer whose values are compared; of a larger one, whether it was written into
_DEEP, _LONG = 3, 100  # containers within one another, and what they hold: more is told by its kind


def _said(value: Any, depth: int = 0) -> Any:
    """Equal for values that are alike, as far as that can be told."""
    if isinstance(value, _PLAIN):
        return value if value == value else str(value)  # of two that are not a number, neither is the other
    if depth < _DEEP and isinstance(value, dict | list | tuple | set) and len(value) <= _LONG:
        inner = value.items() if isinstance(value, dict) else value
        return type(value), [_said(item, depth + 1) for item in inner]
    return id(value) if callable(value) else type(value)


def _buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return module.named_buffers(remove_duplicate=False)


def mark_of(tensor: Tensor) -> Mark:
    """While it is the same, so are the values: how often they were written, and where they lie."""
    return 0 if tensor.is_inference() else tensor._version, storage_key(tensor)


def plain_tensors(module: nn.Module) -> dict[str, Mark]:
    """Marks of the tensors that modules have in their attributes, neither parameters nor buffers."""
    return {name: mark_of(tensor) for name, tensor in tensors_in_attributes(module).items()}


def counted_tensors(model: nn.Module) -> dict[str, int]:
    """How many tensors without a graph each module has, by its path, in its own attributes and buffers."""
    return {
        path: sum(leaf.grad_fn is None for _, _, leaf in _own_tensors(module))
        + sum(buffer is not None for buffer in module._buffers.values())
        for path, module in model.named_modules()
    }


def tensors_in_attributes(module: nn.Module) -> dict[str, Tensor]:
    """These tensors."""
    found: dict[str, Tensor] = {}
    for path, inner in module.named_modules():
        for name, at, tensor in _own_tensors(inner):
            found[f"{path}.{name}".strip(".") + f"[{at}]" * (at > 0)] = tensor
    return found


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """Of one module: the attribute's name, and which of those in it."""
    for name, value in module.__dict__.items():
        if name not in OF_TORCH and isinstance(value, (Tensor, list, tuple, dict)):
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            for at, tensor in enumerate(t for t in leaves if not isinstance(t, nn.Parameter)):
                yield name, at, tensor


def values_of(buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Equal for equal values, as far as that is seen: of large ones by their norms."""
    return {name: _values(buffer) or fingerprint([buffer]) for name, buffer in buffers.items()}


def _values(buffer: Tensor) -> bytes | None:
    """Equal for equal values; None where they are not looked at, being many or none."""
    plain = type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_quantized
    if not plain or not has_data(buffer) or buffer.numel() * buffer.element_size() > _LOOKED_AT:
        return None
    values = buffer.detach().cpu().resolve_conj().resolve_neg().contiguous()
    told = repr((values.dtype, values.shape)).encode()
    return hashlib.sha256(told + values.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _is_kept(name: str, value: Any) -> bool:
    """Adapters are switched by names such as `_active_adapter`: torch's own alone are left out."""
    if isinstance(value, (*_PLAIN, *_GENERATORS)):
        return name not in OF_TORCH
    # The names of several adapters, say; what is written into such a list itself is not put back.
    return type(value) in (list, tuple) and name not in OF_TORCH and all(isinstance(v, _PLAIN) for v in value)


def _as_it_is(value: Any) -> Any:
    """A generator that draws the same as this one will; what is plain, itself."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return copy.deepcopy(value) if isinstance(value, _GENERATORS) else value
