"""Modules of a block that are run otherwise than the block: recomputed in backward, or cut into slices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.children import SELF, Child
from evoplan.model.foreign.lean import as_written, remaking_operators
from evoplan.model.foreign.leaves import distinct
from evoplan.model.foreign.slices import InSlices
from evoplan.model.running.internals import has_data, other_forwards
from evoplan.model.running.kinds import LEAN
from evoplan.model.running.random_state import Draws, ImaginedState, RandomState
from evoplan.model.running.strategy import Strategy

Forward = Callable[..., Any]
_CHUNK = re.compile(r"chunk\((\d+), (\d+)\)")


class Inside:
    """How a block runs under a strategy.

    Args:
        children: what the block calls, by path.
        settings: of its modules when it was planned.
    """

    def __init__(
        self, strategy: Strategy, block: nn.Module, children: Mapping[str, Child], settings: Settings
    ) -> None:
        self.block, self.children, self.settings = block, children, settings
        self.lean = strategy.kind == LEAN.kind
        self.ways = dict(strategy.within)

    @contextmanager
    def recording(self, forward: Forward) -> Iterator[Forward]:
        """Inside, this forward of the block in its place, as it is run for a backward."""
        with ExitStack() as stack:
            if self.lean:
                stack.enter_context(remaking_operators())
            yield stack.enter_context(self.discarding(forward))

    @contextmanager
    def discarding(self, forward: Forward) -> Iterator[Forward]:
        """The same as it is run for no backward: what is cut into slices is, so that it takes no more."""
        with self.below(None):
            yield self._other(SELF, self.block, forward) if SELF in self.ways else forward

    def below(self, path: str | None) -> AbstractContextManager[None]:
        """Inside, the modules that are run otherwise, those within one of them, or (None) the outermost."""
        outer = {at for at in self.ways if at != SELF and self._parent(at) == path}
        modules = {at: self.block.get_submodule(at) for at in outer}
        return other_forwards({m: self._other(at, m, m.forward) for at, m in modules.items()})

    def _parent(self, path: str) -> str | None:
        """The innermost of the modules run otherwise that another one lies in."""
        around = [at for at in self.ways if path.startswith(at + ".")]
        return max(around, key=len, default=None)

    def _other(self, path: str, module: nn.Module, forward: Forward) -> Forward:
        recomputed = _Recomputed(self, path, forward)
        match = _CHUNK.fullmatch(self.ways[path])
        if match is None:
            return recomputed
        child = self.children.get(path)
        if child is None:
            raise ValueError(f"{path} is not called by {type(self.block).__name__}; fit the model again")
        axis, n = child.axis(int(match[1])), int(match[2])
        return InSlices(module, forward, child, axis, n, self.settings, recomputed)


class _Recomputed:
    """A forward of which autograd keeps the arguments alone, and where the generators stood if it draws."""

    def __init__(self, inside: Inside, path: str, forward: Forward) -> None:
        self.inside, self.path, self.forward = inside, path, forward
        child = inside.children.get(path)
        self.draws = child is None or child.draws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        given, again = distinct(leaves), _Again()
        rest = given.without()
        imagined = next((tensor.device for tensor in given.tensors if not has_data(tensor)), None)

        def run(*tensors: Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten(rest.leaves(tensors), structure)
            return self._run(*args, **kwargs)

        with as_written(), again.watched(imagined) if self.draws else nullcontext():
            # Tensor by tensor: of those in lists it would not see that they are not what they were.
            return torch.utils.checkpoint.checkpoint(
                run, *given.tensors, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again)
            )  # fmt: skip

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.inside.below(self.path):
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
