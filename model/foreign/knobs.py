"""A model's own knobs, such as `chunk_size`: other ways to run a block that its author has written.

A knob is an argument that a block is called with, an attribute of modules in it, or whatever a function sets.
Which values give equal results is shown in `model.foreign.equal_results`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Setter = Callable[[nn.Module, Any], None]
Knobs = Mapping[str, Sequence[Any] | tuple[Setter, Sequence[Any]]]

_TEXT = re.compile(r"[\w.-]*")
_ABSENT = object()


@dataclass(frozen=True)
class Knob:
    """A knob of a block.

    Attributes:
        values: those that it may be set to.
        setter: sets it on a block; None: it is an argument of the block's forward.
        position: of that argument among the positional ones, where it may be given so.
        default: the value that it has when nobody turns it, as text; None where that cannot be told.
        about: what it is, in words that follow from the block's own sources; None where they do not say all.
    """

    name: str
    values: tuple[Any, ...]
    setter: Setter | None = None
    position: int | None = None
    default: str | None = None
    about: str | None = None

    def value(self, text: str) -> Any:
        """The value that prints so; ValueError where there is none."""
        for value in self.values:
            if repr(value) == text:
                return value
        known = ", ".join(map(repr, self.values))
        raise ValueError(f"the knob {self.name} has no value {text}, but {known}; fit the model again")

    def given(self, forward: Forward, value: Any) -> Forward:
        """A forward that is called with the value, whatever else its caller gives it."""

        def other(*args: Any, **kwargs: Any) -> Any:
            if self.name not in kwargs and self.position is not None and self.position < len(args):
                args = (*args[: self.position], value, *args[self.position + 1 :])
                return forward(*args, **kwargs)
            return forward(*args, **{**kwargs, self.name: value})

        return other


class Turned:
    """Knobs at the values of a strategy.

    Args:
        knobs: of the block, by name.
        values: as text, by name.
    """

    def __init__(self, block: nn.Module, knobs: Mapping[str, Knob], values: Mapping[str, str]) -> None:
        if unknown := [name for name in values if name not in knobs]:
            raise ValueError(f"{type(block).__name__} has no knob {unknown[0]}; fit the model again")
        self.block = block
        self.values = [(knobs[name], knobs[name].value(text)) for name, text in values.items()]

    def forward(self, forward: Forward) -> Forward:
        """A forward of the block that is given those that are arguments."""
        for knob, value in self.values:
            if knob.setter is None:
                forward = knob.given(forward, value)
        return forward

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The others are set inside, and put back afterwards."""
        with ExitStack() as stack:
            for knob, value in self.values:
                if knob.setter is not None:
                    stack.enter_context(_set(self.block, knob.setter, value))
            yield


@contextmanager
def _set(block: nn.Module, setter: Setter, value: Any) -> Iterator[None]:
    """Attributes of the block's modules that the setter has changed are put back; what else changes inside,
    as a counter does, is not.
    """
    before = [(module.__dict__, module.__dict__.copy()) for module in block.modules()]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        try:
            setter(block, value)
        finally:
            for now, then in before:
                names = [
                    name for name in {**then, **now} if now.get(name, _ABSENT) is not then.get(name, _ABSENT)
                ]
                changed += [(now, name, then.get(name, _ABSENT)) for name in names]
            del before
        yield
    finally:
        for now, name, value_then in changed:
            if value_then is _ABSENT:
                now.pop(name, None)
            else:
                now[name] = value_then


# --- which there are ---------------------------------------------------------------------------


def declared(knobs: Knobs | None) -> tuple[Knob, ...]:
    """Knobs as a caller of `evoplan.fit` names them.

    Raises:
        ValueError: one is no name, or has no values that can be written down; says which.
    """
    found = []
    for name, given in (knobs or {}).items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"a knob is the name of an argument or an attribute, not {name!r}")
        pair = isinstance(given, tuple) and len(given) == 2 and callable(given[0])
        setter, values = given if pair else (None, given)
        if not isinstance(values, list | tuple) or not values or not all(map(_can_be_written, values)):
            raise ValueError(
                f"the knob {name} has {values!r:.60}; give a list of None, booleans, numbers or plain words, "
                "or (setter, list)"
            )
        distinct = tuple({repr(value): value for value in values}.values())
        found.append(Knob(name, distinct, setter))
    return tuple(found)


def _can_be_written(value: Any) -> bool:
    """In a plan's text, and read again."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is str:
        return _TEXT.fullmatch(value) is not None
    return value is None or type(value) in (bool, int)


def found_on(block: nn.Module, knob: Knob, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Knob | None:
    """A knob as this block has it; None: it has none.

    Args:
        args, kwargs: what the block is called with.
    """
    if knob.setter is not None:
        return knob
    if argument := argument_of(block, knob.name, args, kwargs):
        return replace(knob, position=argument[0], default=argument[1], about="argument")
    values = attributes_of(block, knob.name)
    if not values:
        return None
    default = values.pop() if len(values) == 1 else None
    return replace(knob, setter=_Attribute(knob.name), default=default, about="attribute")


def seen_on(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of arguments of a block, and of attributes in it, that are called like a size of chunks and are
    None or a whole number.
    """
    names = {*kwargs, *_parameters(block), *(name for module in block.modules() for name in vars(module))}
    found = []
    for name in sorted(name for name in names if "chunk_size" in name and not name.startswith("_")):
        argument = argument_of(block, name, args, kwargs)
        values = {argument[1]} if argument else attributes_of(block, name)
        if values and all(text == "None" or text.isdigit() for text in values):
            found.append(name)
    return found


def _parameters(block: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(block.forward).parameters
    except (TypeError, ValueError):
        return {}


def argument_of(
    block: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int | None, str] | None:
    """Of an argument that a block's forward takes, its position if it has one, and its value as text."""
    parameters = _parameters(block)
    there = parameters.get(name)
    by_position = [
        p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    position = by_position.index(name) if name in by_position else None
    if name in kwargs:
        value = kwargs[name]
    elif position is not None and position < len(args):
        value = args[position]
    elif there is not None and there.kind in (there.POSITIONAL_OR_KEYWORD, there.KEYWORD_ONLY):
        value = there.default
    else:
        return None
    return (position, repr(value)) if _can_be_written(value) else None


def attributes_of(block: nn.Module, name: str) -> set[str]:
    """The values, as text, of an attribute of that name of the modules of a block."""
    found = {module: getattr(module, name) for module in block.modules() if hasattr(module, name)}
    return {repr(value) for value in found.values() if _can_be_written(value)}


@dataclass(frozen=True)
class _Attribute:
    """Sets an attribute of every module that has it."""

    name: str

    def __call__(self, block: nn.Module, value: Any) -> None:
        for module in block.modules():
            if hasattr(module, self.name) and _can_be_written(getattr(module, self.name)):
                setattr(module, self.name, value)
