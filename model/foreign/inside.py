"""Modules of a block that are run otherwise than the block: recomputed in backward, or cut into slices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import Attributes, Settings
from evoplan.model.foreign.children import SELF, Child
from evoplan.model.foreign.declared import AsDeclared
from evoplan.model.foreign.fingerprints import Fingerprint, alike, fingerprint
from evoplan.model.foreign.knobs import Knob, Turned
from evoplan.model.foreign.lean import as_written, remaking_operators
from evoplan.model.foreign.leaves import distinct
from evoplan.model.foreign.slices import InSlices
from evoplan.model.running.internals import has_data, other_forwards
from evoplan.model.running.kinds import LEAN
from evoplan.model.running.random_state import Draws, ImaginedState, OtherState, RandomState
from evoplan.model.running.strategy import REDO, Strategy

Forward = Callable[..., Any]
ALL_AGAIN = ((SELF, REDO),)  # of a strategy's `within`: the block as a whole runs again in backward
_CHUNK = re.compile(r"chunk\((\d+), (\d+)\)")


def in_autograds_graph(strategy: Strategy) -> bool:
    """Whether a block whose forward has run so once may stay in autograd's own graph.

    Nothing of it runs again there, or all of it does, as under `torch.utils.checkpoint`: gradients of its
    parameters are added to what they have as they come, and what nobody reads is not made again.
    """
    return strategy.modules in ((), ALL_AGAIN)


class Inside:
    """How a block runs under a strategy.

    Args:
        children: what the block calls, by path.
        settings: of its modules when it was planned.
        knobs: of its own, by name.

    Attributes:
        around: makes what modules are in when they run again, where that is not what backward is in.
        tries: whether modules that run again in backward are seen to make the same as in forward. Counters,
            and switches that nobody here knows of, are found so, the first time, which is enough.
    """

    tries = False

    def __init__(
        self,
        strategy: Strategy,
        block: nn.Module,
        children: Mapping[str, Child],
        settings: Settings,
        knobs: Mapping[str, Knob],
    ) -> None:
        self.block, self.children, self.settings = block, children, settings
        self.lean = strategy.kind == LEAN.kind
        self.ways = dict(strategy.modules)
        self.turned = Turned(block, knobs, dict(strategy.knobs))
        self.around: Callable[[], AbstractContextManager[object]] = nullcontext

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
        forward = self.turned.forward(forward)
        with self.turned.in_force(), self.below(None):
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
        if self.ways[path] == REDO:
            return recomputed
        child = self.children.get(path)
        if child is None:
            raise ValueError(f"{path} is not called by {type(self.block).__name__}; fit the model again")
        if match := _CHUNK.fullmatch(self.ways[path]):
            axis, n = child.axis(int(match[1])), int(match[2])
            return InSlices(module, forward, child, axis, n, self.settings, recomputed)
        strategy = Strategy.parse(self.ways[path])
        return AsDeclared(module, forward, child, strategy, self.settings, recomputed)


class _Recomputed:
    """A forward of which autograd keeps the arguments alone, and where the generators stood if it draws."""

    def __init__(self, inside: Inside, path: str, forward: Forward) -> None:
        self.inside, self.path, self.forward = inside, path, forward
        # Whether it draws may depend on what no operator tells: Python's generator, or a changed setting.
        # Where nothing in the block drew, nothing in it may.
        children = [inside.children.get(at) for at in (SELF, path)]
        self.draws = any(child is None or bool(child.draws) for child in children)
        self.module = inside.block if path == SELF else inside.block.get_submodule(path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        given, again = distinct(leaves), _Again(Attributes(self.module.modules()), self.inside.around)
        rest, tries = given.without(), self.inside.tries
        imagined = next((tensor.device for tensor in given.tensors if not has_data(tensor)), None)

        def run(*tensors: Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten(rest.leaves(tensors), structure)
            result = self._run(*args, **kwargs)
            if tries:
                again.compare(self.path, result)
            return result

        whole = torch.utils.checkpoint.set_checkpoint_early_stop(False) if tries else nullcontext()
        with as_written(), whole, again.watched(imagined) if self.draws else nullcontext():
            # Tensor by tensor: of those in lists it would not see that they are not what they were.
            return torch.utils.checkpoint.checkpoint(
                run, *given.tensors, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again)
            )  # fmt: skip

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.inside.turned.in_force(), self.inside.below(self.path):  # in backward as well
            return self.forward(*args, **kwargs)


class _Again:
    """What a module runs in when it runs again: the generators stand where they stood, if it has drawn.

    Args:
        attributes: of its modules: what calls it may give them others for every call.
        around: makes what all of that is in.
    """

    def __init__(
        self, attributes: Attributes, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.random: RandomState | ImaginedState | None = None
        self.others: OtherState | None = None  # where `random` is an imagined one
        self.attributes, self.around = attributes, around
        self._installed = ExitStack()
        self._made: Fingerprint | None = None

    def compare(self, path: str, result: Any) -> None:
        """What it has made, with what it made the first time.

        Raises:
            RuntimeError: that is something else.
        """
        made = fingerprint([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)])
        if self._made is not None and not alike(made, self._made):
            raise RuntimeError(
                f"{path} does not do the same when it runs again: it depends on what others change, "
                "counts its calls, or draws random numbers that are not torch's; have it depend on its "
                "arguments and parameters, or fit without a budget"
            )
        self._made = made

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
        state, others = ImaginedState(imagined), OtherState()
        with Draws() as draws:
            yield
        self.others = others if others.moved() else None
        ImaginedState(imagined)  # as it is looked up whether a real one has moved
        self.random = state if draws.any else None

    def __enter__(self) -> None:
        self._installed.enter_context(self.around())
        self._installed.enter_context(self.attributes.installed())
        if self.random is not None:
            self._installed.enter_context(self.random)
        if self.others is not None:
            self._installed.enter_context(self.others)

    def __exit__(self, *error: Any) -> None:
        self._installed.__exit__(*error)
