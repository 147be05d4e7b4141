"""Runs of a call as a model has them that is under no plan: within autograd's own graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from evoplan.cost_model.later_gradients import LaterGradients
from evoplan.cost_model.trace import Trace
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.inside import Forward, Inside
from evoplan.model.foreign.lean import as_written
from evoplan.model.foreign.leaves import distinct
from evoplan.model.foreign.runs import CallRun
from evoplan.model.running.internals import storage_key
from evoplan.model.running.parameters import Parameters


class AutogradsRun(CallRun):
    """A call within autograd's own graph, as a model that is under no plan has it.

    Args:
        arguments: is told which of them are held.
    """

    root: Tensor | None = None

    def __init__(
        self,
        call: Call,
        forward: Forward,
        leaves: Sequence[Any],
        wanted: Sequence[int],
        parameters: Parameters,
        inside: Inside,
        arguments: Entered,
    ) -> None:
        self.arguments = arguments
        super().__init__(call, forward, leaves, wanted, parameters, inside)

    def entered(self, recording: Forward) -> Forward:
        """It is called with copies, whose holders show."""
        return self.arguments.into(recording)

    def look(self, returned: Sequence[Any], made: Sequence[Tensor], given: Sequence[Any]) -> None:
        """Nothing: it returns copies."""

    def ends(self, made: Sequence[Tensor]) -> list[GradientEdge | None]:
        """None: gradients come of a node of the graph, which holds them no longer than their readers do."""
        if wanted := [tensor for tensor in made if tensor.requires_grad]:
            self.root = LaterGradients.of(wanted)
        return []

    def vjp(
        self, grads: Sequence[Tensor | None], keep: bool = False
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Gradients of the wanted arguments; those of parameters are added to what they have."""
        root, self.root = self.root, None
        if root is not None:
            root.backward(inputs=[*self.inputs.values(), *self.parameters.trained.values()])
        return {at: leaf.grad for at, leaf in self.inputs.items() if leaf.grad is not None}, {}


class Entered:
    """Copies of a forward's arguments, made here: so it shows which of them are held.

    Attributes:
        kept: by position, the bytes of those that are, when `look` was last called.
    """

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        self._storages: dict[int, tuple[int, int]] = {}

    def into(self, forward: Forward) -> Forward:
        """The forward, given copies."""
        return partial(self._call, forward)

    def _call(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        given = distinct(leaves)
        with as_written():  # a copy is what a lean run would make again
            copies = [tensor.clone() for tensor in given.tensors]
        self._storages = {
            at: (storage_key(copies[place]), copies[place].untyped_storage().nbytes())
            for at, place in enumerate(given.places)
            if place is not None
        }
        args, kwargs = pytree.tree_unflatten(given.leaves(copies), structure)
        del copies, leaves
        return forward(*args, **kwargs)

    def look(self, trace: Trace) -> int:
        """How many bytes of them are held now."""
        self.kept = {
            at: trace.in_blocks(nbytes) if trace.holds(storage) else 0
            for at, (storage, nbytes) in self._storages.items()
        }
        held = {storage: self.kept[at] for at, (storage, _) in self._storages.items()}
        return sum(held.values())
