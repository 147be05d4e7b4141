"""Operators on tensors without data, each worked out once for the same layouts.

torch works out in Python what an operator makes on the meta device, a tenth of a millisecond a call, and what
it makes of fake tensors, which say that they are elsewhere, takes it twice that. Most of a trace's calls are
repeated: for other strategies, in a redo, in backward. What one makes anew depends on the layouts of what it
is given alone, so that it can be made again by its own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_META = torch.device("meta")
_MOST = 100_000  # calls that are remembered


class _Layout(NamedTuple):
    """Of a tensor that fills its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device  # where it says that it is

    def made(self, mode: FakeTensorMode | None) -> Tensor:
        """One of it: fake, or on the meta device."""
        if mode is None:
            return self._without_data()
        with torch._C._DisableTorchDispatch():
            data = self._without_data()
        return FakeTensor(mode, data, self.device)

    def _without_data(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=_META)


class _Results(NamedTuple):
    """What an operator has made: one tensor, or several of which some may be left out."""

    layouts: tuple[_Layout | None, ...]
    single: bool

    def made(self, mode: FakeTensorMode | None) -> Any:
        tensors = [None if layout is None else layout.made(mode) for layout in self.layouts]
        return tensors[0] if self.single else tuple(tensors)


_WRITTEN = _Results((), single=True)  # what an operator in place returns: its first argument


class MetaCalls:
    """Calls operators, or repeats what they made before."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Results | None] = {}
        # By the operators' ids, as their hashes are worked out in Python; with them, so that they live.
        self._gives: dict[int, tuple[Any, Callable[[Any, tuple[Any, ...]], _Results | None] | None]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator makes; of views, the operator's own."""
        if id(func) not in self._gives:
            self._gives[id(func)] = func, _results_of(func)
        _, results = self._gives[id(func)]
        if results is None:
            return func(*args, **kwargs)
        try:
            named = ((name, _key(value)) for name, value in kwargs.items()) if kwargs else ()
            key = id(func), torch.get_default_dtype(), *map(_key, args), *named
            known = self._known.get(key, key)
        except TypeError:  # an argument that has no hash, or a number in the disguise of a tensor
            return func(*args, **kwargs)
        if known is _WRITTEN:
            return args[0]
        if isinstance(known, _Results):
            return known.made(_mode_of(args))
        out = func(*args, **kwargs)
        if known is key:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = results(out, args)
        return out


def _results_of(func: Any) -> Callable[[Any, tuple[Any, ...]], _Results | None] | None:
    """How to tell what can be made again of an operator's results; None: never."""
    schema = func._schema
    if func.namespace != "aten":  # somebody's own may do as it likes
        return None
    if not schema.is_mutable:
        return _results if all(result.alias_info is None for result in schema.returns) else None
    return _written if schema.name.endswith("_") and torch.Tag.pointwise in func.tags else None


def _written(out: Any, args: tuple[Any, ...]) -> _Results | None:
    """Of an elementwise operator in place, which leaves the tensor that it writes into as large as it was."""
    return _WRITTEN if out is args[0] else None


def _key(value: Any) -> object:
    """Equal for arguments of which an operator makes the same; TypeError for what cannot be told so."""
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            raise TypeError("a tensor whose values are known")
        return value.shape, value.stride(), value.dtype, value.fake_device
    if isinstance(value, Tensor):
        if value.device != _META:
            raise TypeError("a tensor that is elsewhere")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and make different dtypes


def _mode_of(values: Any) -> FakeTensorMode | None:
    """That of the fake tensors among an operator's arguments, of which all have the same."""
    return next((t.fake_mode for t in tensors_in(values) if isinstance(t, FakeTensor)), None)


def _results(out: Any, args: tuple[Any, ...]) -> _Results | None:
    """What can be made again of an operator's results; None where that cannot be said of all."""
    single = isinstance(out, Tensor)
    results = (out,) if single else out
    if not isinstance(results, tuple) or not all(r is None or isinstance(r, Tensor) for r in results):
        return None
    mode = _mode_of(args)
    taken = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
    layouts: list[_Layout | None] = []
    for tensor in results:
        if tensor is None:
            layouts.append(None)
            continue
        fake = isinstance(tensor, FakeTensor)
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        layout = _Layout(tensor.shape, tensor.stride(), tensor.dtype, device)
        storage, ours = tensor.untyped_storage(), fake if mode else device == _META
        whole = ours and layout.made(mode).untyped_storage().nbytes() == storage.nbytes()
        if storage._cdata in taken or not whole:  # a view after all, whatever its schema says
            return None
        taken.add(storage._cdata)
        layouts.append(layout)
    return _Results(tuple(layouts), single)


def tensors_in(values: Any) -> list[Tensor]:
    """Those among an operator's arguments or results, of which some are in lists."""
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]
