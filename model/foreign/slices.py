"""A module run slice by slice of an axis along which it is independent, and its backward likewise.

Backward runs each slice again, so that of everything within the module only one slice lives at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import Attributes, Settings
from evoplan.model.foreign.children import Axis, Child
from evoplan.model.foreign.lean import as_written
from evoplan.model.foreign.leaves import Distinct, Layout, distinct
from evoplan.model.foreign.noise import OtherDrawsError, SlicedDraws
from evoplan.model.running.context import Context
from evoplan.model.running.internals import as_input, has_data, without_graph
from evoplan.model.running.pieces import spans
from evoplan.model.running.random_state import ImaginedState, RandomState

Forward = Callable[..., Any]
_NOTHING = torch.empty(0)  # in the place of a tensor


class InSlices:
    """A module's forward in slices.

    Args:
        module: whose forward it is.
        axis, n: what is cut into how many.
        settings: of the block's modules when the axis was found.
        otherwise: the forward that stands in where slices would not do the same: the module has other layers
            than when the axis was found, is called otherwise, or hooks within it would see slices.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        child: Child,
        axis: Axis,
        n: int,
        settings: Settings,
        otherwise: Forward,
    ) -> None:
        self.module, self.forward, self.child, self.axis = module, forward, child, axis
        self.n, self.settings, self.otherwise = min(n, axis.length), settings, otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if not self._possible(leaves, structure):
            return self.otherwise(*args, **kwargs)
        given = distinct(leaves, self.axis.arguments)
        slices = _Slices(self, given)
        try:
            made = self._made(slices, given.tensors)
        except OtherDrawsError as error:  # by a kernel that draws by itself, as on some devices
            warn_of(self.child.path, str(error))
            assert slices.random is not None  # else it had not asked
            slices.random.reset()
            return self.otherwise(*args, **kwargs)
        tensors = iter(made)
        whole = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in slices.returned]
        slices.returned = []
        return pytree.tree_unflatten(whole, self.child.returned)

    def _made(self, slices: _Slices, given: Sequence[Tensor]) -> Sequence[Tensor]:
        if not torch.is_grad_enabled():
            return slices.made(given)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        with as_written():
            return _InSlices.apply(slices, *given, *trained)  # type: ignore[no-untyped-call, no-any-return]

    def _possible(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> bool:
        why = not_as_planned(self.module, self.child, self.settings, leaves, structure)
        if why is not None:
            warn_of(self.child.path, why)
        return why is None


def not_as_planned(
    module: nn.Module, child: Child, settings: Settings, leaves: Sequence[Any], structure: pytree.TreeSpec
) -> str | None:
    """Why a module is not to be run in slices, though it was planned so; None: it may be.

    Args:
        settings: of its block's modules when it was planned.
        leaves, structure: of what it is called with.
    """
    if not child.is_called_so(leaves, structure):
        return "it is called otherwise than when it was planned"
    if not settings.hold(child.path, module):
        return "its layers or their settings have changed since it was planned"
    if any(_sees(inner) for inner in module.modules() if inner is not module):
        return "hooks within it would see slices"
    return None


def warn_of(path: str, why: str) -> None:
    """Say why a module takes more memory than planned."""
    warnings.warn(f"{path} is not run in slices, which takes more memory than planned: {why}", stacklevel=5)


def _sees(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or module._backward_pre_hooks
    )  # fmt: skip


class _Slices:
    """One call: which leaves are cut where."""

    def __init__(self, how: InSlices, given: Distinct) -> None:
        self.how, self.context, self.attributes = how, Context.of_steps(), Attributes(how.module.modules())
        self.dims: list[int | None] = given.about
        self.leaves = given.without().leaves
        self.returned: list[Any] = []
        self.random: RandomState | ImaginedState | None = None
        if how.child.draws:
            without = next((t.device for t in given.tensors if not has_data(t)), None)
            self.random = RandomState() if without is None else ImaginedState(without)

    def made(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the module makes of tensors; call without autograd."""
        layouts = [then for then in self.how.child.results if isinstance(then, Layout)]
        whole: list[Tensor] = []
        draws = self.draws()
        for span in self.spans():
            with draws.of(span):
                pieces = self.run(self.cut(given, span))
            for at, piece in enumerate(pieces):
                if len(whole) <= at:  # laid out as the module itself does it
                    whole.append(replace(layouts[at], dtype=piece.dtype).empty(piece.device))
                whole[at].narrow(self.results[at], span.start, span.stop - span.start).copy_(piece)
                del piece
            del pieces
        return tuple(whole)

    @property
    def results(self) -> list[int]:
        """The dimension of each tensor that is made."""
        return [dim for dim in self.how.axis.results if dim is not None]

    def draws(self) -> SlicedDraws:
        """Random numbers of all slices, in their turn."""
        return SlicedDraws(self.how.child.draws, self.how.axis.length)

    def spans(self) -> Iterator[slice]:
        """The slices."""
        return spans(self.how.axis.length, self.how.n)

    def cut(self, given: Sequence[Tensor], span: slice) -> list[Tensor]:
        """Each tensor, or the slice of it."""
        return [
            tensor if dim is None else _slice(tensor, dim, span)
            for tensor, dim in zip(given, self.dims, strict=True)
        ]

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The module on one slice."""
        args, kwargs = pytree.tree_unflatten(self.leaves(given), self.how.child.structure)
        returned = pytree.tree_leaves(self.how.forward(*args, **kwargs))
        # What is no tensor is the module's to say, not the plan's; of the tensors none is held.
        self.returned = [_NOTHING if isinstance(leaf, Tensor) else leaf for leaf in returned]
        return [leaf for leaf in returned if isinstance(leaf, Tensor)]


def _slice(tensor: Tensor, dim: int, span: slice) -> Tensor:
    """Laid out as the module would find it: a copy that is made here is counted here."""
    part = tensor.narrow(dim, span.start, span.stop - span.start)
    return part.contiguous() if tensor.is_contiguous() else part


class _InSlices(torch.autograd.Function):
    """Of a call in slices, autograd keeps what it is given."""

    @staticmethod
    def forward(ctx: Any, slices: _Slices, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What it makes; inputs are the tensors among its arguments, then its trained parameters."""
        ctx.slices = slices
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return slices.made([*map(without_graph, inputs[: len(slices.dims)])])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Slice by slice."""
        slices: _Slices = ctx.slices
        saved, count = ctx.saved_tensors, len(slices.dims)
        found = _Gradients(slices, saved[:count], saved[count:], ctx.needs_input_grad[1:])
        if any(grad is not None for grad in grads):
            draws = slices.draws()
            with slices.random or nullcontext():
                for span in slices.spans():
                    found.add(span, draws, grads)
        return None, *found.rounded()


class _Gradients:
    """Of what a call in slices was given and of its parameters, as slices add to them."""

    def __init__(
        self,
        slices: _Slices,
        given: Sequence[Tensor],
        trained: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> None:
        self.slices, self.trained, self.wanted = slices, trained, wanted
        self.given = [tensor.detach() for tensor in given]
        self.whole: list[Tensor | None] = [None] * len(wanted)
        self._summed: set[int] = set()

    def add(self, span: slice, draws: SlicedDraws, grads: Sequence[Tensor | None]) -> None:
        """Run a slice again and differentiate it."""
        slices, wanted = self.slices, self.wanted
        given = slices.cut(self.given, span)
        for place in range(len(given)):
            if wanted[place]:
                given[place] = given[place].detach().requires_grad_()
        inputs = [tensor for tensor, needed in zip([*given, *self.trained], wanted, strict=True) if needed]
        with torch.enable_grad(), slices.context, slices.attributes.installed(), draws.of(span):
            made = slices.run(list(map(as_input, given)))
        pairs = [
            (tensor, _slice(grad, dim, span))
            for tensor, grad, dim in zip(made, grads, slices.results, strict=True)
            if grad is not None and tensor.requires_grad
        ]
        del made, given
        if not pairs:
            return
        outputs, weights = zip(*pairs, strict=True)
        del pairs
        found = list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
        del outputs, weights, inputs
        for number in [number for number, needed in enumerate(wanted) if needed]:
            self._put(number, found.pop(0), span)

    def _put(self, number: int, grad: Tensor | None, span: slice) -> None:
        """Into its slice of the whole, or added to what other slices have found."""
        if grad is None:
            return
        there = self.whole[number]
        dim = self.slices.dims[number] if number < len(self.given) else None
        if dim is not None:
            if there is None:
                given = self.given[number]
                there = self.whole[number] = torch.zeros(given.shape, dtype=given.dtype, device=given.device)
            there.narrow(dim, span.start, span.stop - span.start).copy_(grad)
            return
        # In half precision the sum is taken in single: a whole run rounds once, not at every slice.
        wide = grad.float() if grad.element_size() == 2 else grad
        # What autograd returns may be the gradient of another input as well: the first sum is a new tensor.
        if there is None:
            self.whole[number] = wide
        elif number in self._summed:
            there.add_(wide)
        else:
            self.whole[number] = there + wide
            self._summed.add(number)

    def rounded(self) -> list[Tensor | None]:
        """Each in the dtype of what it is the gradient of."""
        of = [*self.given, *self.trained]
        return [
            None if grad is None else grad.to(leaf.dtype) for grad, leaf in zip(self.whole, of, strict=True)
        ]
