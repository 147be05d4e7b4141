"""Running a call of a block: for no backward, or recorded by autograd, children of it recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.calls import Call, FromState
from evoplan.model.foreign.lean import remaking_operators
from evoplan.model.running.internals import has_data, other_forwards, put_buffer, without_hooks
from evoplan.model.running.kinds import LEAN
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.random_state import Draws, ImaginedState, RandomState
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import ChangedError, check, marks

Forward = Callable[..., Any]


def discarded(call: Call, forward: Forward, leaves: Sequence[Any]) -> tuple[tuple[Tensor, ...], list[Any]]:
    """What a call makes, and all leaves of what it returns; keeps nothing. Call without autograd."""
    args, kwargs = call.arguments_from(leaves)
    return call.made_of(forward(*args, **kwargs))


class CallRun:
    """A call recorded by autograd.

    Args:
        forward: the block's own.
        leaves: of its arguments.
        wanted: positions of those that a gradient is wanted of.

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
        keeping: AbstractContextManager[object],
    ) -> None:
        self.call, self.parameters = call, parameters
        given = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = {position: given[position].requires_grad_() for position in wanted}
        self._named = {
            f"argument {position}": given[position]
            for position, argument in enumerate(call.arguments)
            if isinstance(argument, FromState) or position in self.inputs
        }
        self._marks = marks(self._named)
        args, kwargs = call.arguments_from(given)
        with torch.enable_grad(), keeping:
            made, returned = call.made_of(forward(*args, **kwargs))
        # Edges, not tensors: what was made belongs to whoever reads it next.
        edge = torch.autograd.graph.get_gradient_edge
        self.edges = [edge(tensor) if tensor.requires_grad else None for tensor in made]
        self.made: tuple[Tensor, ...] = tuple(tensor.detach() for tensor in made)
        self.returned = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in returned]

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
    dropped; and with these others themselves.

    The buffers are not touched: autograd may have saved them.
    """
    present = {name: module.get_buffer(name) for name in (*values, *others)}
    for name, value in values.items():
        put_buffer(module, name, value.clone())
    for name, buffer in others.items():
        put_buffer(module, name, buffer)
    try:
        yield
    finally:
        for name, buffer in present.items():
            put_buffer(module, name, buffer)


def keeping(strategy: Strategy, module: nn.Module, draws: bool) -> AbstractContextManager[object]:
    """What a recorded run of a block goes on in under a strategy.

    Args:
        draws: whether the block draws random numbers.
    """
    if strategy == LEAN:
        return remaking_operators()
    return recomputed(module, strategy.way.recomputed_depth, draws)


def levels_of(module: nn.Module, depth: int) -> int:
    """How many modules are recomputed where so many levels below one are."""
    return sum(1 + levels_of(child, depth - 1) for child in _below(module)) if depth else 0


def _below(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the level below, those of lists among them, as lists are not called."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _below(child)
        else:
            yield child


def recomputed(module: nn.Module, depth: int, draws: bool) -> AbstractContextManager[None]:
    """While installed, each call of a module of so many levels below keeps its inputs, and backward runs it
    again, the modules below it likewise.

    Args:
        draws: whether any of them draws random numbers.
    """
    children = dict.fromkeys(_below(module)) if depth else {}
    return other_forwards({c: _Recomputed(c, c.forward, depth - 1, draws) for c in children})


class _Recomputed:
    """A forward of which autograd keeps the arguments alone, and where the generators stood if it draws."""

    def __init__(self, module: nn.Module, forward: Forward, depth: int, draws: bool) -> None:
        self.module, self.forward, self.depth, self.draws = module, forward, depth, draws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        again = _Again()
        imagined = next((leaf.device for leaf in leaves if not has_data(leaf)), None)
        with again.watched(imagined) if self.draws else nullcontext():
            return torch.utils.checkpoint.checkpoint(
                self._run, *args, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again), **kwargs
            )  # fmt: skip

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with recomputed(self.module, self.depth, self.draws):
            return self.forward(*args, **kwargs)


class _Again:
    """What a module runs in when it runs again: the generators stand where they stood, if it has drawn."""

    def __init__(self) -> None:
        self.random: RandomState | ImaginedState | None = None

    @contextmanager
    def watched(self, imagined: torch.device | None) -> Iterator[None]:
        """The first run.

        Args:
            imagined: where its tensors are, if they have no data.
        """
        if imagined is None:
            before = RandomState()
            yield
            self.random = before if before.moved() else None
            return
        state = ImaginedState(imagined)
        with Draws() as draws:
            yield
        ImaginedState(imagined)  # as it is looked up whether a real one has moved
        self.random = state if draws.any else None

    def __enter__(self) -> None:
        if self.random is not None:
            self.random.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.random is not None:
            self.random.__exit__(*error)
