"""What a run keeps of a submodule for its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from evoplan.model.running.context import Context
from evoplan.model.running.gradients import Gradients, OfParameters, OfState
from evoplan.model.running.internals import (
    as_input,
    gradients_of,
    has_data,
    holders,
    storage_key,
    without_hooks,
)
from evoplan.model.running.kernels import using
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.remake import Keeping
from evoplan.model.running.strategy import COMPILED, Strategy
from evoplan.model.running.submodule import Submodule, Tensors
from evoplan.model.running.unchanged import ChangedError, check, marks
from evoplan.model.running.unread import results_unread

Option = str | int | bool | Callable[..., Any]  # of torch.compile


def new_target(strategy: Strategy, submodule: Submodule, tensors: Tensors) -> Tensor:
    """The new target of a run that is not in pieces."""
    if strategy.kernel == COMPILED and has_data(tensors[submodule.target]):
        return _compiled_target(type(submodule).__name__, submodule.attends)(submodule, tensors)
    return _new_target(submodule, tensors)


def _new_target(submodule: Submodule, tensors: Tensors) -> Tensor:
    return submodule.new_target(tensors)


@cache
def _compiled_target(kind: str, attends: bool) -> Callable[[Submodule, Tensors], Tensor]:
    """Compiled once for each kind of submodule, shapes and grad mode; parameters are arguments of it.

    Each kind has code of its own: all that torch has compiled of one code is tried in turn, at every call.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 256)  # beyond it torch runs the rest as it is written
    # Patterns of attention take our five dimensions for four: they fail, or put something else in its place.
    options: dict[str, Option] | None = {"pattern_matcher": False} if attends else None
    code = _new_target.__code__.replace(co_name=f"new_target_of_{kind}")
    return torch.compile(FunctionType(code, globals()), dynamic=False, fullgraph=True, options=options)


class Run:
    """What a strategy keeps of a submodule's run for its backward.

    Args:
        tensors: everything the stages read, by the submodule's own names.
        wanted: state tensors that a gradient is wanted of; None: all that are read.
        owner: whose tensors they are, where one of them turns out to be changed.
        parameters: the submodule's, where they have been looked up.
    """

    def __init__(
        self,
        submodule: Submodule,
        strategy: Strategy,
        tensors: Tensors,
        wanted: Collection[str] | None = None,
        owner: str = "a submodule",
        parameters: Parameters | None = None,
    ) -> None:
        self.submodule, self.strategy, self.owner = submodule, strategy, owner
        self.wanted = tuple(name for name in submodule.reads if wanted is None or name in wanted)
        self.parameters = Parameters(submodule) if parameters is None else parameters

    def vjp(self, grad: Tensor, keep: bool = False) -> tuple[OfState, OfParameters]:
        """Gradients of the wanted state tensors and of the parameters, from that of the new target.

        Args:
            keep: it will be asked for again.

        Raises:
            ChangedError: a tensor that is needed was written in place since; the message names it.
        """
        raise NotImplementedError

    def storages(self) -> list[torch.UntypedStorage]:
        """What it alone keeps, where it was asked to know: neither state nor masks nor parameters."""
        return []


class WholeRun(Run):
    """A run that is not in pieces, recorded by autograd.

    Args:
        unread: nobody will read the new target, nor does backward: its last product is not made.
        movable: it is to know its storages.
    """

    def __init__(
        self,
        submodule: Submodule,
        strategy: Strategy,
        tensors: Tensors,
        wanted: Collection[str] | None = None,
        owner: str = "a submodule",
        parameters: Parameters | None = None,
        unread: bool = False,
        movable: bool = False,
    ) -> None:
        super().__init__(submodule, strategy, tensors, wanted, owner, parameters)
        self.leaves = {name: tensors[name].detach().requires_grad_() for name in self.wanted}
        others = {name: tensors[name].detach() for name in submodule.reads if name not in self.leaves}
        # Inputs that no gradient is wanted of are for the message alone, if somebody still has them.
        self._read = WeakValueDictionary({name: tensors[name] for name in submodule.reads})
        self._marks = marks(self._read)
        reading = results_unread() if unread else nullcontext()
        with torch.enable_grad(), using(strategy.kernel), self.keeping(movable) as kept, reading:
            leaves = {name: as_input(leaf) for name, leaf in self.leaves.items()}
            output = new_target(strategy, submodule, {**tensors, **others, **leaves})
        given = (tensors[name] for name in (*submodule.reads, *submodule.constants))
        elsewhere = (*given, *submodule.parameters(), output)
        self._kept = kept if movable and isinstance(kept, Keeping) else None
        self._not_its_own = {storage_key(tensor) for tensor in elsewhere} if movable else set()
        # An edge, not the tensor: the output belongs to whoever reads it next.
        self.edge = torch.autograd.graph.get_gradient_edge(output) if output.requires_grad else None
        self.output: Tensor | None = output.detach()

    def keeping(self, movable: bool) -> AbstractContextManager[object]:
        """What forward runs in: it may have autograd keep something else than it would."""
        return Keeping() if movable else nullcontext()

    def storages(self) -> list[torch.UntypedStorage]:
        tensors = [] if self._kept is None else self._kept.tensors()
        kept = Counter(map(storage_key, tensors))
        own = {storage_key(t): t for t in tensors if storage_key(t) not in self._not_its_own}
        # What has more holders is somebody else's too: a layer's buffer, or what a hook has seen of it.
        return [t.untyped_storage() for key, t in own.items() if holders(t) == kept[key]]

    def as_forward(self) -> AbstractContextManager[object]:
        """What backward runs in: autograd has the parameters themselves."""
        return self.parameters.as_trained()

    def check(self) -> None:
        """ChangedError where backward would run forward's operators again on something else."""

    def take_output(self) -> Tensor:
        """The new target; the record does not hold it any longer."""
        output, self.output = self.output, None
        assert output is not None
        return output

    def vjp(self, grad: Tensor, keep: bool = False) -> tuple[OfState, OfParameters]:
        if self.edge is None:
            return {}, {}
        trained = self.parameters.trained
        inputs = [*self.leaves.values(), *trained.values()]
        with self._named_changes(), self.as_forward(), without_hooks(trained.values()):
            self.check()
            grads = gradients_of(self.edge, inputs, grad, keep)
        of_parameters = zip(trained, grads[len(self.leaves) :], strict=True)
        return dict(zip(self.leaves, grads, strict=False)), dict(of_parameters)

    @contextmanager
    def _named_changes(self) -> Iterator[None]:
        """Autograd's own check of what it has saved, with the tensor's name where that can be told."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ChangedError) or "modified by an inplace operation" in str(error):
                there = {**self._read, **self.leaves}
                check({name: mark for name, mark in self._marks.items() if name in there}, there, self.owner)
                self.parameters.check(self.owner)
            raise


class PiecewiseRun(Run):
    """A run in pieces: holds the submodule's input and nothing else; `product` is its kind's own."""

    def __init__(
        self,
        submodule: Submodule,
        strategy: Strategy,
        tensors: Tensors,
        wanted: Collection[str] | None = None,
        owner: str = "a submodule",
        parameters: Parameters | None = None,
    ) -> None:
        super().__init__(submodule, strategy, tensors, wanted, owner, parameters)
        self.context = Context.of_steps()
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._marks = marks(self.tensors)

    def vjp(self, grad: Tensor, keep: bool = False) -> tuple[OfState, OfParameters]:
        """As WholeRun's, recomputing piece by piece."""
        check(self._marks, self.tensors, self.owner)
        self.parameters.check(self.owner)
        trained = self.parameters.trained
        with torch.no_grad(), using(self.strategy.kernel):  # autograd is on for one piece at a time
            gradients = Gradients(self.submodule, trained, self.tensors, self.wanted, grad)
            with self.parameters.installed(), self.context:
                self.product(grad, gradients)
            return gradients.of_state, gradients.rounded()

    def product(self, grad: Tensor, gradients: Gradients) -> None:
        """Recompute and differentiate piece by piece; the gradients are added up in `gradients`."""
        raise NotImplementedError
