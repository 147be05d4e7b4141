"""Where the code of a model that somebody else wrote comes from, so that it is known when it has changed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Their versions are told otherwise.
_KNOWN = sys.stdlib_module_names | {"torch", "numpy"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def sources_of(things: Iterable[Any]) -> str | None:
    """A digest of the files that classes and functions come from, and all that these import.

    A file is told by its path, size and time of its last change. None: something comes from no file, but was
    typed into a notebook, say.
    """
    todo = {getattr(thing, "__module__", None) for thing in things}
    seen: set[str] = set()
    files = set()
    while todo:
        name = todo.pop()
        if name is None:
            return None
        if name in seen or name.partition(".")[0] in _KNOWN:
            continue
        seen.add(name)
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None or not Path(file).is_file():
            return None
        stat = Path(file).stat()
        files.add((file, stat.st_size, stat.st_mtime_ns))
        todo |= {other for other in map(_module_of, list(vars(module).values())) if other in sys.modules}
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


def _module_of(value: Any) -> str | None:
    if isinstance(value, ModuleType):
        return value.__name__ if getattr(value, "__file__", None) else None
    return value.__module__ if isinstance(value, type | FunctionType) else None


def told(module: nn.Module) -> str | None:
    """A module's layers and what they have in their attributes, in words; None where that does not suffice.

    Hooks may keep what they see, and belong to nobody's class.
    """
    try:
        return repr([(name, _of_layer(layer)) for name, layer in module.named_modules()])
    except (_UnknownError, ValueError, RecursionError):  # an empty cell; a list that is in itself
        return None


class _UnknownError(Exception):
    pass


_HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks")]
_OF_TORCH = nn.Module().__dict__.keys() - {"training"}


def _of_layer(layer: nn.Module) -> Any:
    if "forward" in layer.__dict__ or any(layer.__dict__.get(name) for name in _HOOKS):
        raise _UnknownError
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters(recurse=False)):
        raise _UnknownError
    own = {name: value for name, value in layer.__dict__.items() if name not in _OF_TORCH}
    return _name(type(layer)), _code(type(layer).forward), {n: _said(value) for n, value in own.items()}


def _code(function: Any, seen: tuple[Any, ...] = ()) -> Any:
    """Of a method, which may have come into a class from elsewhere; of a decorator, all that it decorates."""
    if not isinstance(function, FunctionType):
        raise _UnknownError
    if function in seen:
        return _name(function)
    within = [cell.cell_contents for cell in function.__closure__ or ()]
    return _digest(function.__code__), [
        _code(value, (*seen, function)) if isinstance(value, FunctionType) else _said(value)
        for value in within
    ]


@cache
def _digest(code: CodeType) -> str:
    constants = [_digest(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    about = code.co_filename, code.co_firstlineno, code.co_code, code.co_names, constants
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _said(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return [(_said(key), _said(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return _name(type(value)), [_said(item) for item in value]
    if isinstance(value, type | BuiltinFunctionType):
        return _name(value)
    if isinstance(value, FunctionType):
        if value.__closure__ or value.__defaults__ or value.__kwdefaults__:
            raise _UnknownError
        return _name(value)
    if isinstance(value, nn.Module):
        return _name(type(value)), [_of_layer(layer) for layer in value.modules()]
    if callable(value):
        raise _UnknownError
    return _name(type(value)), _said_of(value)


def _said_of(value: Any) -> str:
    """Of an object that nothing is known of: what it says of itself, unless that is where it lies."""
    said = repr(value)
    if " at 0x" in said or len(said) > 10_000:
        raise _UnknownError
    return said


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
