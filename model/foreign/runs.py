"""Running a call of a block: for no backward, or recorded by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from evoplan.model.foreign.calls import Call, FromState
from evoplan.model.foreign.inside import Forward, Inside
from evoplan.model.foreign.leaves import distinct
from evoplan.model.running.internals import as_input, members, put_buffer, without_graph, without_hooks
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.unchanged import ChangedError, check, marks


def discarded(
    call: Call, forward: Forward, leaves: Sequence[Any], inside: Inside
) -> tuple[tuple[Tensor, ...], list[Any]]:
    """What a call makes, and all leaves of what it returns; keeps nothing. Call without autograd."""
    each = distinct(leaves)
    given = each.leaves([*map(without_graph, each.tensors)])
    args, kwargs = call.arguments_from(given)
    with inside.discarding(forward) as discarding:
        made, returned = call.made_of(discarding(*args, **kwargs))
    call.check_passed(returned, made, given)
    # As a record has them: what is a view without a graph could not be written into by who gets it.
    return tuple(tensor.detach() for tensor in made), returned


class CallRun:
    """A call recorded by autograd.

    Args:
        forward: the block's own.
        leaves: of its arguments.
        wanted: positions of those that a gradient is wanted of, of each tensor once.
        inside: how its modules are run.

    Attributes:
        made, returned: what it makes, and all leaves of what it returns; both may be taken once.
    """

    def __init__(
        self,
        call: Call,
        forward: Forward,
        leaves: Sequence[Any],
        wanted: Sequence[int],
        parameters: Parameters,
        inside: Inside,
    ) -> None:
        self.call, self.parameters, self._runs_again = call, parameters, bool(inside.ways)
        each = distinct(leaves)
        tensors = [tensor.detach() for tensor in each.tensors]
        given = each.leaves(tensors)
        self.inputs = {position: given[position].requires_grad_() for position in wanted}
        self._named = {
            f"argument {position}": given[position]
            for position, argument in enumerate(call.arguments)
            if isinstance(argument, FromState) or position in self.inputs
        }
        self._marks = marks(self._named)
        with torch.enable_grad(), inside.recording(forward) as recording:
            tensors = [as_input(tensor) if tensor.requires_grad else tensor for tensor in tensors]
            given = each.leaves(tensors)
            args, kwargs = call.arguments_from(given)
            made, returned = call.made_of(self.entered(recording)(*args, **kwargs))
        self.look(returned, made, given)
        self.edges = self.ends(made)
        self.made: tuple[Tensor, ...] = tuple(tensor.detach() for tensor in made)
        self.returned = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in returned]

    def entered(self, recording: Forward) -> Forward:
        """What is called: the forward as it is recorded."""
        return recording

    def look(self, returned: Sequence[Any], made: Sequence[Tensor], given: Sequence[Any]) -> None:
        """At what it returns and did not make."""
        self.call.check_passed(returned, made, given)

    def ends(self, made: Sequence[Tensor]) -> list[GradientEdge | None]:
        """Where gradients come in: edges, not tensors, as what was made belongs to whoever reads it next."""
        return [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in made]

    @property
    def closed(self) -> list[int]:
        """Places of what it makes that no gradient goes through."""
        return [at for at, edge in enumerate(self.edges) if edge is None]

    def take(self) -> tuple[tuple[Tensor, ...], list[Any]]:
        """What it makes and returns; the record does not hold it any longer."""
        taken, self.made, self.returned = (self.made, self.returned), (), []
        return taken

    def vjp(
        self, grads: Sequence[Tensor | None], keep: bool = False
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Gradients of the wanted arguments by position and of the parameters, from those of what it made.

        Raises:
            ChangedError: a tensor that is needed was written in place since.
        """
        pairs = [
            (edge, grad)
            for edge, grad in zip(self.edges, grads, strict=True)
            if edge is not None and grad is not None
        ]
        if not pairs:
            return {}, {}
        if self._runs_again:  # on parameters that autograd has not saved, so that it does not look
            self.parameters.check(self.call.name)
        trained = self.parameters.trained
        edges, given = zip(*pairs, strict=True)
        try:
            with self.parameters.installed(), without_hooks(trained.values()):
                inputs = [*self.inputs.values(), *trained.values()]
                found = list(torch.autograd.grad(edges, inputs, given, keep, allow_unused=True))
        except RuntimeError as error:
            if isinstance(error, ChangedError) or "modified by an inplace operation" in str(error):
                check(self._marks, self._named, self.call.name)
                self.parameters.check(self.call.name)
            raise
        del pairs, edges, given, grads
        for at, grad in enumerate(found[: len(self.inputs)]):
            # Laid out here, where it is counted, and not by whoever gets it, beside the other.
            found[at] = None if grad is None else grad.contiguous()
            del grad
        of_inputs = dict(zip(self.inputs, found, strict=False))
        return of_inputs, dict(zip(trained, found[len(of_inputs) :], strict=True))


@contextmanager
def other_buffers(
    module: nn.Module, values: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> Iterator[None]:
    """The module with copies of these values for its buffers of those names, of which what it writes is
    dropped; and with these others themselves. A buffer that has several names has them all.

    The buffers are not touched: autograd may have saved them.
    """
    put = {name: value.clone() for name, value in values.items()} | dict(others)
    put |= {tied: put[name] for tied, name in members(module).tied_buffers.items() if name in put}
    present = {name: module.get_buffer(name) for name in put}
    for name, buffer in put.items():
        put_buffer(module, name, buffer)
    try:
        yield
    finally:
        for name, buffer in present.items():
            put_buffer(module, name, buffer)
