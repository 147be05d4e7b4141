"""Leaves of what modules are given and return: layouts of tensors, plain values, and which are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evoplan.model.running.internals import storage_key

# Autograd's nodes of plain views: a chain of them that ends at the same place in memory changes no gradient.
# What somebody else's function returns as a view, with a gradient of its own, is none.
VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T", "Transpose", "UnsafeView",
        "Unsqueeze", "View",
    )
) | {"BackwardHookFunctionBackward"}  # fmt: skip


Numbers = tuple[Any, ...]


class Key(NamedTuple):
    """What tells a tensor from others.

    Attributes:
        numbers: equal for tensors that show the same numbers: the same place in memory, not written between.
        source: where its gradient goes; None where it wants none.
    """

    numbers: Numbers
    source: Any


class ChangedCallError(RuntimeError):
    """A block is called otherwise than when the plan was made; the message says what differs."""


@dataclass(frozen=True)
class Layout:
    """Of a tensor: what memory follows from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))

    def empty(self, where: str | torch.device = "cpu") -> Tensor:
        """A tensor laid out so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=where)

    def gradient(self, where: str | torch.device = "cpu") -> Tensor:
        """A gradient of such a tensor: its numbers in order, whatever lies between them."""
        return torch.empty(self.shape, dtype=self.dtype, device=where)

    @property
    def continuous(self) -> bool:
        """Whether such tensors have gradients at all."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def gradient_bytes(self) -> int:
        """Bytes of that."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """How many numbers there are in it."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        if 0 in self.shape:
            return 0
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (reach + 1) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Value:
    """A leaf that is no tensor."""

    value: Any


def same_values(one: Any, other: Any) -> bool:
    """Whether two that are no tensors are alike; what is not a number is, too."""
    try:
        return one is other or bool(one == other or (one != one and other != other))
    except Exception:  # of arrays it has no answer
        return False


def key_of(tensor: Tensor) -> Key:
    """Equal for tensors that are one another in all that a block can see. Holds autograd's node."""
    return Key(numbers_of(tensor), _source_of(tensor))


def numbers_of(tensor: Tensor) -> Numbers:
    """As `Key` has them; the storage first."""
    version = 0 if tensor.is_inference() else tensor._version
    layout = tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
    return storage_key(tensor), *layout, tensor.is_conj(), tensor.is_neg(), version


def _source_of(tensor: Tensor) -> Any:
    if not tensor.requires_grad:
        return None
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name() in VIEWS:
        node, number = node.next_functions[number]
    leaf = tensor if node is None else getattr(node, "variable", None)
    return (node, number) if leaf is None else id(leaf)


class Distinct(NamedTuple):
    """Leaves whose tensors are listed once each.

    Attributes:
        tensors: without those that are the same object.
        about: what is said of each.
        places: of each leaf its place among them; None where it is no tensor.
        rest: the leaves that are none; None elsewhere.
    """

    tensors: list[Tensor]
    about: list[Any]
    places: list[int | None]
    rest: list[Any]

    def without(self) -> Distinct:
        """The same, holding no tensor."""
        return self._replace(tensors=[])

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves with others in place of the tensors."""
        return [
            rest if place is None else tensors[place]
            for rest, place in zip(self.rest, self.places, strict=True)
        ]


def distinct(leaves: Sequence[Any], about: Sequence[Any] | None = None) -> Distinct:
    """Leaves with each tensor once, since a module may ask whether two are the same.

    Args:
        about: something that is said of each leaf; a tensor of which more is said is listed more than once.
    """
    found = Distinct([], [], [], [])
    known: dict[tuple[int, Any], int] = {}
    for leaf, said in zip(leaves, about or [None] * len(leaves), strict=True):
        place = None
        if isinstance(leaf, Tensor):
            place = known.setdefault((id(leaf), said), len(found.tensors))
            if place == len(found.tensors):
                found.tensors.append(leaf)
                found.about.append(said)
        found.places.append(place)
        found.rest.append(None if isinstance(leaf, Tensor) else leaf)
    return found


def twins_in(leaves: Sequence[Any]) -> dict[int, int]:
    """Positions of tensors that are the same object as one before, and where that is first."""
    known: dict[int, int] = {}
    first = [known.setdefault(id(leaf), at) for at, leaf in enumerate(leaves)]
    return {at: then for at, then in enumerate(first) if then != at and isinstance(leaves[at], Tensor)}
