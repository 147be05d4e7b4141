"""Modules that compute what a submodule of ours does, run as that: in its pieces, or with its kernels.

Which they are an adapter says (`model.adapters`). That it is right is shown here, as axes are: a copy in
double precision with random parameters, run both ways, results and gradients compared.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.adapters import Adapter, adapter_of
from evoplan.model.adapters.adapter import Adapted
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.children import Child, Declared
from evoplan.model.foreign.equal_results import apart
from evoplan.model.foreign.independence import smaller
from evoplan.model.foreign.lean import as_written
from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.probing import Probe, Ran, Shapes
from evoplan.model.foreign.slices import not_as_planned, warn_of
from evoplan.model.running.execution import record
from evoplan.model.running.internals import backward_pass, other_forwards, storage_key
from evoplan.model.running.kernels import kernels_for, using
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.submodule import IndependentAxis, Submodule, Tensors

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
_PIECES = 3  # in which it is tried: uneven, as sizes are


class AsDeclared:
    """A module's forward as that of a submodule of ours.

    Args:
        strategy: that the submodule runs under.
        settings: of the block's modules when it was shown to be that submodule.
        otherwise: the forward that stands in where it is that no longer.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        child: Child,
        strategy: Strategy,
        settings: Settings,
        otherwise: Forward,
    ) -> None:
        self.module, self.forward, self.child, self.adapter = module, forward, child, adapter_of(module)
        self.strategy, self.settings, self.otherwise = strategy, settings, otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        why = not_as_planned(self.module, self.child, self.settings, *pytree.tree_flatten((args, kwargs)))
        if why is None and self.adapter is not None and _runs_its_own_code(self.module, self.forward):
            adapted = self.adapter.adapted(self.module, args, kwargs)
            if adapted is not None:
                return run(adapted, self.strategy, self.child.path)
        warn_of(self.child.path, why or "it is asked for something else than when it was planned")
        return self.otherwise(*args, **kwargs)


def _runs_its_own_code(module: nn.Module, forward: Forward) -> bool:
    """Whether neither it nor what it calls has another forward hung on it."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return own and not any("forward" in inner.__dict__ for inner in module.modules() if inner is not module)


def run(adapted: Adapted, strategy: Strategy, owner: str) -> Tensor:
    """What a module returns, by a strategy of our submodule."""
    submodule, tensors = adapted.submodule, adapted.tensors
    if not torch.is_grad_enabled():
        with using(strategy.kernel):
            new = strategy.way.discarded(submodule, strategy, tensors, in_place=False)
        return adapted.result(new)
    trained = {name: p for name, p in submodule.named_parameters() if p.requires_grad}
    how = _How(submodule, strategy, owner, tuple(tensors), tuple(trained))
    with as_written():
        new = _AsDeclared.apply(how, *tensors.values(), *trained.values())  # type: ignore[no-untyped-call]
    return adapted.result(new)


class _How:
    """What a call is run by, apart from its tensors."""

    def __init__(
        self,
        submodule: Submodule,
        strategy: Strategy,
        owner: str,
        names: tuple[str, ...],
        trained: tuple[str, ...],
    ) -> None:
        self.submodule, self.strategy, self.owner = submodule, strategy, owner
        self.names, self.trained = names, trained

    def recorded(self, tensors: Tensors, wanted: Sequence[str]) -> tuple[Record, Tensor]:
        """Its record, and what it makes."""
        return record(self.submodule, self.strategy, tensors, wanted, self.owner)


class _AsDeclared(torch.autograd.Function):
    """Of a submodule's run autograd keeps what the run itself keeps: the record."""

    @staticmethod
    def forward(ctx: Any, how: _How, *inputs: Tensor) -> Tensor:
        """The new target; inputs are the tensors that the stages read, then the trained parameters."""
        count = len(how.names)
        needed = dict(zip(how.names, ctx.needs_input_grad[1 : count + 1], strict=True))
        wanted = [name for name in how.submodule.reads if needed[name]]
        ctx.how = how
        ctx.record, new = how.recorded(dict(zip(how.names, inputs[:count], strict=True)), wanted)
        return new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the record, which goes with the graph."""
        if ctx.record is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time; call backward(retain_graph=True) the "
                "first time"
            )
        _, keep = backward_pass()
        of_state, of_parameters = ctx.record.vjp(grad, keep)
        if not keep:
            ctx.record = None
        how: _How = ctx.how
        return (
            None,
            *(of_state.get(name) for name in how.names),
            *(of_parameters.get(name) for name in how.trained),
        )


def declared(module: nn.Module, child: Child) -> Declared | None:
    """What is declared of the submodule of ours that a module was shown to be; None: it is no such.

    Args:
        module: itself; it is copied.
    """
    adapter = adapter_of(module)
    if adapter is None or not child.plain or child.draws:
        return None
    before = random.getstate()
    for shapes in smaller(child, module):
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                return _Trial(child, module, shapes, adapter).found()
        except Exception as error:  # somebody else's code, with sizes that nobody has told it of
            logger.debug("%s as declared with shapes %s: %s", child.path, shapes, error)
        finally:
            random.setstate(before)
    return None


class _Trial(Probe):
    """A module's copy, and arguments of which masks are noughts and ones, some of each."""

    def __init__(self, child: Child, module: nn.Module, shapes: Shapes, adapter: Adapter) -> None:
        super().__init__(child, module, shapes)
        self.adapter = adapter
        adapted = self._adapted()
        constants = {storage_key(adapted.tensors[name]) for name in adapted.submodule.constants}
        masks = [
            at
            for at, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and storage_key(leaf) in constants
        ]
        for at in masks:
            self.leaves[at] = (self.leaves[at] > -1).to(self.dtype)
        self.wanted = [at for at in self.wanted if at not in masks]
        self.submodule = adapted.submodule

    def _adapted(self) -> Adapted:
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.child.structure)
        adapted = self.adapter.adapted(self.module, args, kwargs)
        if adapted is None:
            raise ValueError("it is asked for something else")
        return adapted

    def found(self) -> Declared | None:
        """What is declared, if our submodule makes the same however it is run."""
        plain = self.differentiated(self.leaves, self.weights)
        if not all(grad is not None and bool(grad.any()) for grad in plain.grads):
            return None  # it shows nothing
        errors = [apart(plain, self._under(strategy)) for strategy in self._tried()]
        if max(errors) > self.close:
            return None
        (made,) = (then for then in self.child.results if isinstance(then, Layout))
        cuts = {axis.name: axis.cuts[self.submodule.target] for axis in _independent(self.submodule)}
        return Declared({name: made.shape[dim] for name, dim in cuts.items()}, self.submodule.attends)

    def _under(self, strategy: Strategy) -> Ran:
        def other(*args: Any, **kwargs: Any) -> Any:
            adapted = self.adapter.adapted(self.module, args, kwargs)
            assert adapted is not None  # it has been asked before
            return run(adapted, strategy, self.child.path)

        with other_forwards({self.module: other}):
            return self.differentiated(self.leaves, self.weights)

    def _tried(self) -> Iterator[Strategy]:
        """Every way to run it, once."""
        chunks = [Strategy("chunk", axis.name, _PIECES) for axis in _independent(self.submodule)]
        plain = [WHOLE, LEAN, *chunks]
        kernels = [*kernels_for("cpu"), *kernels_for("cuda")] if self.submodule.attends else []
        yield from plain
        yield from (replace(strategy, kernel=kernel) for kernel in kernels for strategy in plain)


def _independent(submodule: Submodule) -> list[IndependentAxis]:
    return [axis for axis in submodule.axes if isinstance(axis, IndependentAxis)]
