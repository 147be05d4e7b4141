"""Running one submodule under a strategy: forward, and the vector-Jacobian product of backward.

The maths is the submodule's three stages; this file decides in how many pieces they run. A
whole run is recorded by autograd. Runs in pieces record nothing: their backward
recomputes each piece from the submodule's input, so that one piece's activations exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from evoplan.model.kernels import using
from evoplan.model.pieces import spans
from evoplan.model.remake import Remaking
from evoplan.model.strategy import COMPILED, Strategy
from evoplan.model.submodule import (
    ReductionAxis,
    Submodule,
    Tensors,
    dropped,
)

# Gradients by name: those of the state tensors, and those of the parameters.
Gradients = dict[str, Tensor]
ParameterGradients = dict[str, Tensor]


def run_discarded(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool = False
) -> Tensor:
    """The new target, keeping nothing for backward. Call without autograd.

    Args:
        in_place: pieces may write into the old target: nobody else has it, and nobody reads it again. A whole
            run makes its update as large as the target anyway and adds it up there.
    """
    with using(strategy.kernel):
        if not strategy.in_pieces:
            return _whole(strategy, submodule, tensors)
        run = _chunked if strategy.kind == "chunk" else _cosharded
        return run(submodule, strategy, tensors, in_place)


def _whole(strategy: Strategy, submodule: Submodule, tensors: Tensors) -> Tensor:
    """The new target of a run that is not in pieces."""
    if strategy.kernel == COMPILED and not isinstance(tensors[submodule.target], FakeTensor):
        return _compiled_target(submodule.attends)(submodule, tensors)
    return _new_target(submodule, tensors)


def _new_target(submodule: Submodule, tensors: Tensors) -> Tensor:
    return submodule.new_target(tensors)


@cache
def _compiled_target(attends: bool) -> Callable[[Submodule, Tensors], Tensor]:
    """Compiled once for each kind of submodule, shapes and grad mode; parameters are arguments of it."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 256)  # beyond it torch runs the rest as it is written
    # Patterns of attention take our five dimensions for four: they fail, or put something else in its place.
    options = {"pattern_matcher": False} if attends else None
    return torch.compile(_new_target, dynamic=False, fullgraph=True, options=options)


class WholeRun:
    """A whole or lean run recorded by autograd, for one backward."""

    def __init__(self, submodule: Submodule, strategy: Strategy, tensors: Tensors) -> None:
        self.parameters = dict(submodule.named_parameters())
        self.leaves = {name: tensors[name].detach().requires_grad_() for name in submodule.reads}
        keeping = Remaking() if strategy.kind == "lean" else nullcontext()
        with torch.enable_grad(), using(strategy.kernel), keeping:
            output = _whole(strategy, submodule, {**tensors, **self.leaves})
        # An edge, not the tensor: the output belongs to whoever reads it next.
        self.edge = torch.autograd.graph.get_gradient_edge(output)
        self.output: Tensor | None = output.detach()

    def take_output(self) -> Tensor:
        """The new target; the record does not hold it any longer."""
        output, self.output = self.output, None
        assert output is not None
        return output

    def vjp(self, grad: Tensor) -> tuple[Gradients, ParameterGradients]:
        """Gradients of the state tensors read and of the parameters, from that of the new target."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        inputs = [*self.leaves.values(), *trained.values()]
        grads = torch.autograd.grad(self.edge, inputs, grad, allow_unused=True)
        return dict(zip(self.leaves, grads, strict=False)), dict(
            zip(trained, grads[len(self.leaves) :], strict=True)
        )


class PiecewiseRun:
    """A run in pieces: holds the submodule's input and nothing else."""

    def __init__(self, submodule: Submodule, strategy: Strategy, tensors: Tensors) -> None:
        self.submodule, self.strategy, self.tensors = submodule, strategy, dict(tensors)

    def vjp(self, grad: Tensor) -> tuple[Gradients, ParameterGradients]:
        """As WholeRun.vjp, recomputing piece by piece."""
        strategy = self.strategy
        product = _chunked_vjp if strategy.kind == "chunk" else _cosharded_vjp
        with torch.no_grad(), using(strategy.kernel):  # autograd is on for one piece at a time
            gradients = _Gradients(self.submodule, self.tensors, grad)
            product(self.submodule, strategy, self.tensors, grad, gradients)
            return gradients.of_state, gradients.rounded()


Run = WholeRun | PiecewiseRun


def record(submodule: Submodule, strategy: Strategy, tensors: Tensors) -> tuple[Run, Tensor]:
    """Run forward for a later backward: the record to call `vjp` on, and the new target."""
    if not strategy.in_pieces:
        run = WholeRun(submodule, strategy, tensors)
        return run, run.take_output()
    with torch.no_grad():
        return PiecewiseRun(submodule, strategy, tensors), run_discarded(submodule, strategy, tensors)


# Every tensor along its rows: what follows a reduction needs one position at a time.
_ROWS = {"m": -3, "z": -3, "msa_mask": -2, "pair_mask": -2, "pair_count": -2}


def _cuts(submodule: Submodule, cuts: Mapping[str, int]) -> Mapping[str, int]:
    """`cuts`, and where the dropout mask is cut with the target unless it is shared along that axis."""
    dim = cuts[submodule.target]
    return cuts if submodule.dropout_shared_dim == dim else {**cuts, "dropout": dim}


def _view(tensor: Tensor, dim: int, span: slice) -> Tensor:
    return tensor.narrow(dim, span.start, span.stop - span.start)


def _cut(tensors: Tensors, cuts: Mapping[str, int], span: slice) -> dict[str, Tensor]:
    # Contiguous, so that a copy is made here, where it is counted, and not inside a kernel.
    return {
        name: _view(tensor, cuts[name], span).contiguous() if name in cuts else tensor
        for name, tensor in tensors.items()
    }


def _pick(tensors: Tensors, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names if name in tensors}


def _buffer(target: Tensor, in_place: bool) -> Tensor:
    """Where pieces put the new target: over the old one, of which a piece reads its own slice only."""
    return target if in_place else torch.empty_like(target, memory_format=torch.contiguous_format)


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """The running sum of gradients; the first term becomes the buffer."""
    if total is None or term is None:
        return term if total is None else total
    return total.add_(term)


class _Gradients:
    """Gradients being summed over pieces."""

    def __init__(self, submodule: Submodule, tensors: Tensors, grad: Tensor) -> None:
        self.parameters = {name: p for name, p in submodule.named_parameters() if p.requires_grad}
        target, *others = submodule.reads
        self.of_state = {name: torch.zeros_like(tensors[name]) for name in others}
        # The residual passes the target's gradient on; where no stage reads the target, that is all.
        self.of_state[target] = (
            grad.clone(memory_format=torch.contiguous_format) if target in submodule.norms else grad
        )
        self.of_parameters: ParameterGradients = {}

    def differentiate(
        self, function: Callable[[Tensors], Tensor], leaves: Tensors, grad: Tensor
    ) -> dict[str, Tensor | None]:
        """Gradients of `leaves` through function(leaves); those of parameters are added up here."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        with torch.enable_grad():
            edge = torch.autograd.graph.get_gradient_edge(function(leaves))
        grads = torch.autograd.grad(
            edge, [*leaves.values(), *self.parameters.values()], grad, allow_unused=True
        )
        for name, term in zip(self.parameters, grads[len(leaves) :], strict=True):
            if term is not None:
                total = self.of_parameters.get(name)
                # In half precision the sum is taken in single: a whole run rounds once, not at every piece.
                wide = term.float() if term.element_size() == 2 else term
                self.of_parameters[name] = wide if total is None else total.add_(wide)
        return dict(zip(leaves, grads, strict=False))

    def rounded(self) -> ParameterGradients:
        """Gradients of the parameters in the parameters' own dtype."""
        return {name: total.to(self.parameters[name].dtype) for name, total in self.of_parameters.items()}

    def add_slices(self, grads: Mapping[str, Tensor | None], cuts: Mapping[str, int], span: slice) -> None:
        """Add gradients of slices of the state to those of the whole."""
        for name, term in grads.items():
            if name in self.of_state and term is not None:
                total = self.of_state[name]
                (_view(total, cuts[name], span) if name in cuts else total).add_(term)


# --- chunks of an independent axis ----------------------------------------------------------


def _piece_spans(submodule: Submodule, strategy: Strategy, size: int) -> Iterator[slice]:
    # Ranks share one strategy, and a rank's shard may be shorter than the one it was chosen for.
    return spans(size, strategy.n if submodule.sharding is None else min(strategy.n, size))


def _context_spans(submodule: Submodule, n: int, tensors: Tensors) -> Iterator[slice]:
    name, dim = next(iter(submodule.context_cuts.items()))
    size = tensors[name].shape[dim]
    return spans(size, min(n, size))


def _context_in_slices(submodule: Submodule, n: int, tensors: Tensors) -> Tensor | None:
    if not submodule.context_inputs:
        return None
    inputs = _pick(tensors, submodule.context_inputs)
    name, dim = next(iter(submodule.context_cuts.items()))
    context: Tensor | None = None
    for span in _context_spans(submodule, n, tensors):
        part = submodule.sliced_context(_cut(inputs, submodule.context_cuts, span))
        if context is None:
            shape = list(part.shape)
            shape[submodule.context_dim] = inputs[name].shape[dim]
            context = part.new_empty(shape)
        _view(context, submodule.context_dim, span).copy_(part)
        del part
    return submodule.gathered(context)


def _chunked(submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
    axis = submodule.axis(strategy.axis)
    target, cuts = submodule.target, _cuts(submodule, axis.cuts)
    context = _context_in_slices(submodule, strategy.n, tensors)
    new = _buffer(tensors[target], in_place)
    for span in _piece_spans(submodule, strategy, new.shape[cuts[target]]):
        piece = _cut(tensors, cuts, span)
        torch.add(piece[target], submodule.update(piece, context), out=_view(new, cuts[target], span))
        del piece
    return new


def _chunked_vjp(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, grad: Tensor, gradients: _Gradients
) -> None:
    axis = submodule.axis(strategy.axis)
    target, cuts = submodule.target, _cuts(submodule, axis.cuts)
    context = _context_in_slices(submodule, strategy.n, tensors)
    inputs = _pick(tensors, (*submodule.piece_inputs, *submodule.finish_inputs, "dropout"))
    state = [name for name in inputs if name in submodule.reads]

    def one_piece(span: slice) -> Tensor | None:
        piece = _cut(inputs, cuts, span)
        leaves = _pick(piece, state)
        if context is not None:
            leaves["context"] = context
        grads = gradients.differentiate(
            lambda x: submodule.update({**piece, **x}, x.get("context")),
            leaves,
            _view(grad, cuts[target], span).contiguous(),
        )
        gradients.add_slices(grads, cuts, span)
        return grads.get("context")

    context_grad: Tensor | None = None
    for span in _piece_spans(submodule, strategy, grad.shape[cuts[target]]):
        context_grad = _add(context_grad, one_piece(span))
    if context_grad is None:
        return
    context = None
    if submodule.sharding is not None:
        context_grad = submodule.sharding.reduce(context_grad)
    inputs = _pick(tensors, submodule.context_inputs)
    for span in _context_spans(submodule, strategy.n, tensors):
        piece = _cut(inputs, submodule.context_cuts, span)
        grads = gradients.differentiate(
            lambda x, piece=piece: submodule.sliced_context({**piece, **x}),
            _pick(piece, submodule.reads),
            _view(context_grad, submodule.context_dim, span).contiguous(),
        )
        gradients.add_slices(grads, submodule.context_cuts, span)
        del piece, grads


# --- co-shards of a reduction axis ----------------------------------------------------------


def _row_spans(tensor: Tensor, n: int) -> Iterator[slice]:
    return spans(tensor.shape[-3], min(n, tensor.shape[-3]))


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
        partial = _partial(submodule, x, part)
        if axis.concatenate:
            if total is None:
                total = partial.new_empty((*partial.shape[:-1], axis.size))
            total[..., part] = partial
        else:
            total = _add(total, partial)
        del partial
    assert total is not None
    return total


def _finished(submodule: Submodule, update: Tensor, tensors: Tensors) -> Tensor:
    x = submodule.normalised(tensors, submodule.finish_inputs)
    return dropped(submodule.finish(update, *(x[name] for name in submodule.finish_inputs)), tensors)


def _cosharded(submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
    axis = submodule.axis(strategy.axis)
    cuts = _cuts(submodule, _ROWS)
    target = tensors[submodule.target]
    update = _reduced(submodule, axis, strategy.n, _normalised_inputs(submodule, tensors))
    new = _buffer(target, in_place)
    inputs = _pick(tensors, (*submodule.finish_inputs, "dropout"))
    for span in _row_spans(target, strategy.n):
        rows = _finished(submodule, _view(update, -3, span).clone(), _cut(inputs, cuts, span))
        torch.add(_view(target, -3, span), rows, out=_view(new, -3, span))
        del rows
    return new


def _cosharded_vjp(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, grad: Tensor, gradients: _Gradients
) -> None:
    axis = submodule.axis(strategy.axis)
    cuts = _cuts(submodule, _ROWS)
    x = _normalised_inputs(submodule, tensors)
    update = None if submodule.finish_is_affine else _reduced(submodule, axis, strategy.n, x)
    finish_inputs = _pick(tensors, (*submodule.finish_inputs, "dropout"))

    def finish_rows(span: slice) -> Tensor:
        piece = _cut(finish_inputs, cuts, span)
        grad_rows = _view(grad, -3, span).contiguous()
        # An affine finish has the same gradient anywhere: at zero, say.
        rows = torch.zeros_like(grad_rows) if update is None else _view(update, -3, span)
        grads = gradients.differentiate(
            lambda x: _finished(submodule, x["update"].clone(), {**piece, **x}),
            {"update": rows, **_pick(piece, submodule.reads)},
            grad_rows,
        )
        gradients.add_slices(grads, cuts, span)
        return grads["update"]

    update_grad: Tensor | None = None
    for span in _row_spans(grad, strategy.n):
        rows = finish_rows(span)
        if update_grad is None:
            update_grad = rows.new_empty((*grad.shape[:-1], rows.shape[-1]))
        _view(update_grad, -3, span).copy_(rows)
        del rows
    update = None

    state = [name for name in x if name in submodule.reads]
    x_grads: dict[str, Tensor] = {}
    for part in spans(axis.size, strategy.n):
        grads = gradients.differentiate(
            lambda leaves, part=part: _partial(submodule, {**x, **leaves}, part),
            _pick(x, state),
            update_grad[..., part].contiguous() if axis.concatenate else update_grad,
        )
        for name in state:
            x_grads[name] = _add(x_grads.get(name), grads[name])
        del grads
    del update_grad
    x.clear()
    for name in state:
        for span in _row_spans(tensors[name], strategy.n):
            grads = gradients.differentiate(
                lambda leaves, name=name: submodule.normalised(leaves, (name,))[name],
                {name: _view(tensors[name], -3, span).contiguous()},
                _view(x_grads[name], -3, span),
            )
            gradients.add_slices(grads, _ROWS, span)
            del grads
        del x_grads[name]
