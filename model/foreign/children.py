"""Modules that a block calls in turn: what each is given and returns, and along which axes it may be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from evoplan.model.foreign.leaves import Layout, Value, same_values
from evoplan.model.foreign.noise import Draw

SELF = "."  # the path of a block in itself


@dataclass(frozen=True)
class Axis:
    """A dimension along which a module does the same for each part, whatever the others are.

    Attributes:
        dim: of its first result; by this it is called.
        arguments: the dimension of each leaf of the arguments that is cut, None where it is given whole.
        results: the dimension of each leaf of the results.
        length: how long it is.
    """

    dim: int
    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...]
    length: int


@dataclass(frozen=True)
class Declared:
    """What is declared of the submodule of ours that a module computes.

    Attributes:
        axes: those along which it is independent, by name, and how long they are.
        attends: whether there are kernels for it.
    """

    axes: Mapping[str, int]
    attends: bool


@dataclass(frozen=True, eq=False)
class Child:
    """A module as its block has called it.

    Attributes:
        path: in the block.
        parent: the path of the module that has called it.
        calls: how often it was called; what else is said here holds for the first.
        work: equal for calls that run the same operators on the same shapes.
        structure, arguments: of what it was given, flattened.
        wanted: which of the arguments required a gradient.
        read: which of them any operator has read.
        returned, results: of what it returned.
        plain: whether it can be run part by part at all: it draws no random numbers but such as parts of can
            be told, writes into no buffer, reads no tensor but its arguments, parameters and buffers, and all
            that it returns it has made.
        stays: whether what it was given is not written into later in the block: else it cannot run again.
        draws: what random numbers it draws, in turn; None where slices of them could not be told.
        changes: whether it writes into a buffer.
        kept_bytes: what autograd keeps of it to its backward, beside what it was given and returned.
        peak_bytes: the most that it adds to what is live when it is called.
        seconds: predicted time of a run.
        autocast: the dtype that it was called under torch.autocast to.
        prove: finds its axes; asked when they are wanted first, as it runs the module.
        compare: finds which submodule of ours it is; asked when that is wanted first.
    """

    path: str
    parent: str
    calls: int
    work: str
    structure: pytree.TreeSpec
    arguments: tuple[Layout | Value, ...]
    wanted: tuple[bool, ...]
    read: tuple[bool, ...]
    returned: pytree.TreeSpec
    results: tuple[Layout | Value, ...]
    plain: bool
    stays: bool
    draws: tuple[Draw | None, ...]
    changes: bool
    kept_bytes: int
    peak_bytes: int
    seconds: float
    autocast: torch.dtype | None = None
    prove: Callable[[Child], tuple[Axis, ...]] = lambda child: ()
    compare: Callable[[Child], Declared | None] = lambda child: None

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """Those along which it was shown to be independent."""
        return self.prove(self)

    @cached_property
    def declared(self) -> Declared | None:
        """What it was shown to be."""
        return self.compare(self)

    def axis(self, dim: int) -> Axis:
        """That of a name; ValueError if there is none."""
        for axis in self.axes:
            if axis.dim == dim:
                return axis
        raise ValueError(f"{self.path} is not independent along dimension {dim}; fit the model again")

    def is_called_so(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> bool:
        """Whether these are arguments as they were, but for their values."""
        return structure == self.structure and all(
            isinstance(leaf, Tensor) and (tuple(leaf.shape), leaf.dtype) == (then.shape, then.dtype)
            if isinstance(then, Layout)
            else not isinstance(leaf, Tensor) and same_values(leaf, then.value)
            for leaf, then in zip(leaves, self.arguments, strict=True)
        )


def layouts_of(leaves: Sequence[Any]) -> tuple[Layout | Value, ...]:
    """Of leaves, those that are tensors without their data."""
    return tuple(Layout.of(leaf) if isinstance(leaf, torch.Tensor) else Value(leaf) for leaf in leaves)
