"""Calls of modules as a forward makes them: what it is given and returns, and what it calls in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.leaves import Key, Numbers, key_of, numbers_of
from evoplan.model.running.random_state import OtherState


@dataclass(eq=False)
class Visit:
    """A module called in the forward that was watched.

    Attributes:
        start, stop: the operators that ran inside of it, by number.
        keys, out_keys: of the leaves of its arguments and of its results that are tensors, as they were then.
        wanted: which of the arguments require a gradient.
        changes: names of the buffers that were written into.
        plain: names of tensors in its modules' attributes, no buffers, that were read.
        replaces: those of them that were written into or replaced.
        writes: whether it wrote into one of its arguments.
        others: where Python's and NumPy's generators stood, if it drew from them and that was looked for.
        differentiated: whether gradients were found in it, or some with a graph of what it made, before
            the forward was over.
        hooked: whether something else keeps tensors in autograd's place there: a checkpoint around it, say.
    """

    path: str
    module: nn.Module
    arguments: list[Any]
    structure: pytree.TreeSpec
    start: int = 0
    recorded: bool = field(default_factory=torch.is_grad_enabled)
    keys: list[Key | None] = field(init=False)
    wanted: list[bool] = field(init=False)
    children: list[Visit] = field(default_factory=list)
    stop: int = 0
    results: list[Any] = field(default_factory=list)
    returned: pytree.TreeSpec | None = None
    out_keys: list[Key | None] = field(default_factory=list)
    changes: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    writes: bool = False
    hooked: bool = False
    others: OtherState | None = None
    differentiated: bool = False

    def __post_init__(self) -> None:
        self.keys = keys_of(self.arguments)
        self.wanted = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self.arguments]

    def differentiates(self, grads: object) -> None:
        """A backward comes by: if that has a graph itself (create_graph), more follow."""
        self.differentiated = self.differentiated or torch.is_grad_enabled()

    @property
    def numbers(self) -> list[Numbers | None]:
        """Of the leaves of its arguments that are tensors, as they were."""
        return [None if key is None else key.numbers for key in self.keys]


def keys_of(leaves: Sequence[Any]) -> list[Key | None]:
    """Of those leaves that are tensors."""
    return [key_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]


def numbers_in(leaves: Sequence[Any]) -> list[Numbers | None]:
    """Of those leaves that are tensors."""
    return [numbers_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
