"""Running a submodule as co-shards of a reduction axis, one after the other, and its backward likewise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from evoplan.model.running.gradients import Gradients
from evoplan.model.running.kinds.chunk import Chunk
from evoplan.model.running.kinds.pieces import InPieces
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.pieces import spans
from evoplan.model.running.runs import PiecewiseRun
from evoplan.model.running.slices import add, buffer, cut, cuts_of, pick, put, view
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import (
    Axis,
    IndependentAxis,
    ReductionAxis,
    Submodule,
    Tensors,
    dropped,
)


class CoshardedRun(PiecewiseRun):
    """Differentiates share by share."""

    def product(self, grad: Tensor, gradients: Gradients) -> None:
        cosharded_vjp(self.submodule, self.strategy, self.tensors, grad, gradients)


class Coshard(InPieces):
    """Shares of a reduction axis, one after the other; they save logits, of which other kernels have none."""

    name = "coshard"
    axis = ReductionAxis
    run = CoshardedRun
    takes_kernels = False

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """As any kind, but where a layer was replaced or has hooks: of its weight no slice can be taken."""
        return iter(()) if any(altered_layers(submodule)) else super().offered(submodule, shape)

    def length(self, submodule: Submodule, axis: Axis, shape: Sequence[int]) -> int:
        assert isinstance(axis, ReductionAxis)
        return axis.size

    def possible(self, submodule: Submodule, strategy: Strategy) -> Strategy:
        """The strategy; or in place of co-shards, which need slices of weights, as many chunks."""
        altered = next(altered_layers(submodule), None)
        if altered is None:
            return strategy
        (axis,) = (axis for axis in submodule.axes if isinstance(axis, IndependentAxis))
        name, layer = altered
        instead = replace(strategy, kind=Chunk.name, axis=axis.name)
        warnings.warn(
            f"{type(submodule).__name__} runs as {instead} in place of {strategy}, since {name} "
            f"({type(layer).__name__}) has hooks or was replaced; plan again for the model as it is",
            stacklevel=3,
        )
        return instead

    def discarded(self, submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
        return cosharded(submodule, strategy, tensors, in_place)


def cosharded(submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
    """The new target, share by share; call without autograd.

    Raises:
        AlteredLayerError: one of its layers has been replaced or has hooks.
    """
    axis = submodule.axis_of(ReductionAxis, strategy.axis)
    cuts = cuts_of(submodule, submodule.rows)
    target, dim = tensors[submodule.target], cuts[submodule.target]
    update = _reduced(submodule, axis, strategy.n, _normalised_inputs(submodule, tensors))
    new = buffer(target, in_place)
    inputs = pick(tensors, (*submodule.finish_inputs, "dropout"))
    for span in _row_spans(target, dim, strategy.n):
        rows = _finished(submodule, view(update, dim, span).clone(), cut(inputs, cuts, span))
        put(view(new, dim, span), view(target, dim, span) if submodule.residual else None, rows)
        del rows
    return new


def cosharded_vjp(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, grad: Tensor, gradients: Gradients
) -> None:
    """Recompute and differentiate share by share; the gradients are added up in `gradients`."""
    axis = submodule.axis_of(ReductionAxis, strategy.axis)
    cuts = cuts_of(submodule, submodule.rows)
    dim = cuts[submodule.target]
    x = _normalised_inputs(submodule, tensors)
    update = None if submodule.finish_is_affine else _reduced(submodule, axis, strategy.n, x)
    finish_inputs = pick(tensors, (*submodule.finish_inputs, "dropout"))

    def finish_rows(span: slice) -> Tensor:
        piece = cut(finish_inputs, cuts, span)
        grad_rows = view(grad, dim, span).contiguous()
        # An affine finish has the same gradient anywhere: at zero, say.
        rows = torch.zeros_like(grad_rows) if update is None else view(update, dim, span)
        grads = gradients.differentiate(
            lambda x: _finished(submodule, x["update"].clone(), {**piece, **x}),
            {"update": rows, **gradients.wanted(piece)},
            grad_rows,
        )
        gradients.add_slices(grads, cuts, span)
        of_update = grads["update"]
        assert of_update is not None  # every finish reads it
        return of_update

    def share(part: slice, leaves: Tensors) -> Tensor:
        return _partial(submodule, {**x, **leaves}, part)

    update_grad: Tensor | None = None
    for span in _row_spans(grad, dim, strategy.n):
        rows = finish_rows(span)
        if update_grad is None:
            update_grad = rows.new_empty((*grad.shape[:-1], rows.shape[-1]))
        view(update_grad, dim, span).copy_(rows)
        del rows
    update = None
    assert update_grad is not None  # there are rows

    state = [name for name in x if name in submodule.reads and gradients.reach(name)]
    x_grads: dict[str, Tensor] = {}
    for part in spans(axis.size, strategy.n):
        grads = gradients.differentiate(
            partial(share, part),
            pick(x, state),
            update_grad[..., part].contiguous() if axis.concatenate else update_grad,
        )
        for name in state:
            if (total := add(x_grads.get(name), grads[name])) is not None:
                x_grads[name] = total
        del grads
    del update_grad
    x.clear()
    _through_norms(submodule, strategy.n, tensors, x_grads, gradients)


def _through_norms(
    submodule: Submodule, n: int, tensors: Tensors, x_grads: dict[str, Tensor], gradients: Gradients
) -> None:
    """From gradients of what was normalised to those of the state; they are used up."""
    for name in list(x_grads):
        dim = submodule.rows[name]

        def normalised(leaves: Tensors, name: str = name) -> Tensor:
            return submodule.normalised(leaves, (name,))[name]

        for span in _row_spans(tensors[name], dim, n):
            rows = {name: view(tensors[name], dim, span).contiguous()}
            grads = gradients.differentiate(normalised, rows, view(x_grads[name], dim, span))
            gradients.add_slices(grads, submodule.rows, span)
            del rows, grads
        del x_grads[name]


def _row_spans(tensor: Tensor, dim: int, n: int) -> Iterator[slice]:
    return spans(tensor.shape[dim], min(n, tensor.shape[dim]))


def _partial(submodule: Submodule, x: Tensors, part: slice) -> Tensor:
    context = None
    if submodule.context_inputs:
        context = submodule.gathered(
            submodule.context(*(x[name] for name in submodule.context_inputs), part=part)
        )
    return submodule.piece(*(x[name] for name in submodule.piece_inputs), context=context, part=part)


def _normalised_inputs(submodule: Submodule, tensors: Tensors) -> dict[str, Tensor]:
    return submodule.normalised(tensors, (*submodule.context_inputs, *submodule.piece_inputs))


def _reduced(submodule: Submodule, axis: ReductionAxis, n: int, x: Tensors) -> Tensor:
    """The sum (or concatenation) of all partial updates."""
    total: Tensor | None = None
    for part in spans(axis.size, n):
        share = _partial(submodule, x, part)
        if axis.concatenate:
            if total is None:
                total = share.new_empty((*share.shape[:-1], axis.size))
            total[..., part] = share
        else:
            total = add(total, share)
        del share
    assert total is not None
    return total


def _finished(submodule: Submodule, update: Tensor, tensors: Tensors) -> Tensor:
    x = submodule.normalised(tensors, submodule.finish_inputs)
    return dropped(submodule.finish(update, *(x[name] for name in submodule.finish_inputs)), tensors)
