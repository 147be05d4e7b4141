"""What operators write into: as their schemas say, and as some do without a word."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# A normalisation's running statistics, which kernels write into though schemas call them inputs, and no
# version counts it; and the operators that only read them.
_STATISTICS = {"running_mean", "running_var"}
_READING = ("backward", "no_update", "no_training")
_WHETHER = ("training", "train")


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operator writes into."""
    names, quiet = _names(func)
    if not names and not quiet:
        return []
    return _tensors(func, args, kwargs, names) + quietly_written(func, args, kwargs)


def quietly_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Of that, what does not count it."""
    _, quiet = _names(func)
    if not quiet or not all(given_as(func, args, kwargs, name, True) for name in _WHETHER):
        return []
    return _tensors(func, args, kwargs, quiet)


def given_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, otherwise: Any) -> Any:
    """What an operator is given for an argument of a name, or what stands for it; or there is none such."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return kwargs.get(name, args[at] if at < len(args) else argument.default_value)
    return otherwise


def _names(func: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the arguments that an operator writes into, and of those that it does so without a word."""
    if id(func) not in _known:
        arguments = func._schema.arguments
        said = frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        reads = any(part in func._schema.name for part in _READING)
        quiet = frozenset() if reads else _STATISTICS & {a.name for a in arguments} - said
        _known[id(func)] = func, (said, frozenset(quiet))
    return _known[id(func)][1]


# By the operators' ids, whose hashes are worked out in Python.
_known: dict[int, tuple[Any, tuple[frozenset[str], frozenset[str]]]] = {}


def _tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: frozenset[str]) -> list[Tensor]:
    leaves = pytree.tree_leaves([given_as(func, args, kwargs, name, None) for name in sorted(names)])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
