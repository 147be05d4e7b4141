"""Running a submodule in chunks of an independent axis, and its backward likewise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

from torch import Tensor

from evoplan.model.running.affine import leaves_results_unread
from evoplan.model.running.gradients import Gradients
from evoplan.model.running.kinds.pieces import InPieces
from evoplan.model.running.pieces import spans
from evoplan.model.running.runs import PiecewiseRun
from evoplan.model.running.slices import add, buffer, cut, cuts_of, pick, put, view
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Axis, IndependentAxis, Submodule, Tensors
from evoplan.model.running.unread import results_unread

# Long axes are cut into more chunks, down to such pieces: one attention map of 2,048 residues takes 16 MiB
# per head in float32.
MORE, LEAST_LENGTH = (128, 256, 512), 8


class ChunkedRun(PiecewiseRun):
    """Differentiates chunk by chunk."""

    def product(self, grad: Tensor, gradients: Gradients) -> None:
        chunked_vjp(self.submodule, self.strategy, self.tensors, grad, gradients)


class Chunk(InPieces):
    """Slices of an independent axis, one after the other."""

    name = "chunk"
    axis = IndependentAxis
    run = ChunkedRun

    def length(self, submodule: Submodule, axis: Axis, shape: Sequence[int]) -> int:
        assert isinstance(axis, IndependentAxis)
        return shape[axis.cuts[submodule.target]]

    def counts(self, length: int) -> list[int]:
        """The usual ones, and more where pieces stay long."""
        return super().counts(length) + [n for n in MORE if n * LEAST_LENGTH <= length]

    def discarded(self, submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
        return chunked(submodule, strategy, tensors, in_place)


def chunked(submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
    """The new target, chunk by chunk; call without autograd."""
    axis = submodule.axis_of(IndependentAxis, strategy.axis)
    target, cuts = submodule.target, cuts_of(submodule, axis.cuts)
    context = _context_in_slices(submodule, strategy.n, tensors)
    new = buffer(tensors[target], in_place)
    inputs = pick(tensors, (*_read(submodule), *([target] if submodule.residual else ())))
    for span in _clipped_spans(new.shape[cuts[target]], strategy.n):
        piece = cut(inputs, cuts, span)
        update = submodule.update(piece, context)
        put(view(new, cuts[target], span), piece[target] if submodule.residual else None, update)
        del piece, update
    return new


def chunked_vjp(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, grad: Tensor, gradients: Gradients
) -> None:
    """Recompute and differentiate chunk by chunk; the gradients are added up in `gradients`."""
    axis = submodule.axis_of(IndependentAxis, strategy.axis)
    target, cuts = submodule.target, cuts_of(submodule, axis.cuts)
    context = _context_in_slices(submodule, strategy.n, tensors)
    inputs, unread = pick(tensors, _read(submodule)), leaves_results_unread(submodule)

    def one_piece(span: slice) -> Tensor | None:
        piece = cut(inputs, cuts, span)
        leaves = gradients.wanted(piece)
        if context is not None:
            leaves["context"] = context
        with results_unread() if unread else nullcontext():
            grads = gradients.differentiate(
                lambda x: submodule.update({**piece, **x}, x.get("context")),
                leaves,
                view(grad, cuts[target], span).contiguous(),
            )
        gradients.add_slices(grads, cuts, span)
        return grads.get("context")

    def part_of_context(piece: Tensors, leaves: Tensors) -> Tensor:
        return submodule.sliced_context({**piece, **leaves})

    context_grad: Tensor | None = None
    for span in _clipped_spans(grad.shape[cuts[target]], strategy.n):
        context_grad = add(context_grad, one_piece(span))
    if context_grad is None:
        return
    context = None
    if submodule.sharding is not None:
        context_grad = submodule.sharding.reduce(context_grad)
    inputs = pick(tensors, submodule.context_inputs)
    for span in _context_spans(submodule, strategy.n, tensors):
        piece = cut(inputs, submodule.context_cuts, span)
        grads = gradients.differentiate(
            partial(part_of_context, piece),
            gradients.wanted(piece),
            view(context_grad, submodule.context_dim, span).contiguous(),
        )
        gradients.add_slices(grads, submodule.context_cuts, span)
        del piece, grads


def _read(submodule: Submodule) -> tuple[str, ...]:
    """What the stages read of a slice."""
    return (*submodule.piece_inputs, *submodule.finish_inputs, "dropout")


def _clipped_spans(size: int, n: int) -> Iterator[slice]:
    # The axis may be shorter than the one that n was chosen for: another crop, a rank's shard.
    return spans(size, min(n, size))


def _context_spans(submodule: Submodule, n: int, tensors: Tensors) -> Iterator[slice]:
    name, dim = next(iter(submodule.context_cuts.items()))
    return _clipped_spans(tensors[name].shape[dim], n)


def _context_in_slices(submodule: Submodule, n: int, tensors: Tensors) -> Tensor | None:
    if not submodule.context_inputs:
        return None
    inputs = pick(tensors, submodule.context_inputs)
    name, dim = next(iter(submodule.context_cuts.items()))
    context: Tensor | None = None
    for span in _context_spans(submodule, n, tensors):
        part = submodule.sliced_context(cut(inputs, submodule.context_cuts, span))
        if context is None:
            shape = list(part.shape)
            shape[submodule.context_dim] = inputs[name].shape[dim]
            context = part.new_empty(shape)
        view(context, submodule.context_dim, span).copy_(part)
        del part
    return submodule.gathered(context)
