"""What one step costs under each strategy that it offers: bytes and work, traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.later_gradients import LaterGradients
from evoplan.cost_model.trace import Trace, Work
from evoplan.model.running.affine import leaves_results_unread
from evoplan.model.running.chain import Step
from evoplan.model.running.execution import record, record_unread, run_discarded, write
from evoplan.model.running.kernels import kernels_for
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import COMPILED, KINDS, Record, Strategy

FEW = 8  # pieces in which attention is run with another kernel, at most

# The loss, its parts and its gradient: a few numbers, live whenever a step runs again.
LOSS_NUMBERS, NUMBER_BYTES = 4, 128


class Forward(NamedTuple):
    """A forward that is recorded for backward: its peak in bytes, its work, and its time."""

    bytes: int
    work: Work
    seconds: float = 0.0


class Backward(NamedTuple):
    """Peaks of a backward, in bytes: in any case, and where others hold what the step has made."""

    bytes: int
    held_bytes: int


class AsWritten(NamedTuple):
    """A step in autograd's own graph, which adds gradients of parameters to what they have as they come, and
    holds a gradient no longer than its readers do.

    Attributes:
        backward_bytes, backward_held_bytes: as those of a `StepCost`.
        keeps_given: positions of the arguments that are held to its backward, where others may go before.
    """

    backward_bytes: int
    backward_held_bytes: int = 0
    keeps_given: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepCost:
    """One step under one strategy. Bytes are above the state it enters with.

    In inference only the discarding run is traced; nothing else has a cost then.

    Attributes:
        forward_bytes: peak of a forward that is recorded for backward, its new target included.
        preserved_bytes: held from the end of that forward to its backward, without the new target.
        backward_bytes: peak of its backward: what is preserved, the gradients that are live there
            (of all state that later steps read) and the workspace.
        discard_bytes: peak of a forward that keeps nothing, its new target included where that is a new
            tensor: in inference pieces write over a target that the chain made itself.
        keeps_made: which of the tensors that it makes are held to its backward as well, beside what is
            preserved: something later in the step reads them.
        backward_held_bytes: peak of its backward above those where others hold them too: else they go early.
        as_written: what differs where autograd has the run in its own graph, as it has on the first pass
            those that are not in pieces; None of others.
        unread: a recorded forward that leaves out what its backward does not read; None where that is
            nothing. What it preserves, and its backward, are those of any other.
        discard_seconds, forward_seconds, backward_seconds: time of each; a backward recomputes pieces.
    """

    strategy: Strategy
    forward_bytes: int
    preserved_bytes: int
    backward_bytes: int
    discard_bytes: int
    discard_work: Work
    forward_work: Work
    backward_work: Work
    discard_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    keeps_made: tuple[int, ...] = ()
    backward_held_bytes: int = 0
    as_written: AsWritten | None = None
    unread: Forward | None = None

    @property
    def forward(self) -> Forward:
        """A forward that is recorded, all of it."""
        return Forward(self.forward_bytes, self.forward_work, self.forward_seconds)

    @property
    def ending(self) -> Forward | None:
        """What runs of it where it ends a redo, so that nobody reads its results: in pieces, nothing."""
        return None if self.strategy.in_pieces else self.unread or self.forward

    @property
    def ending_seconds(self) -> float:
        """The time of that."""
        return 0.0 if self.ending is None else self.ending.seconds

    def backward(self, in_graph: bool) -> Backward:
        """Peaks of its backward.

        Args:
            in_graph: it was recorded where autograd may have it in its own graph.
        """
        if in_graph and self.as_written is not None:
            return Backward(self.as_written.backward_bytes, self.as_written.backward_held_bytes)
        return Backward(self.backward_bytes, self.backward_held_bytes)

    @property
    def inter_mem(self) -> int:
        """Peak of a forward and backward above what is preserved."""
        return max(self.forward_bytes, self.backward_bytes) - self.preserved_bytes

    def as_tuple(self) -> tuple[int, int, float]:
        """(inter_mem, preserved_mem, time): the projection that people read."""
        return self.inter_mem, self.preserved_bytes, self.forward_seconds + self.backward_seconds


def offered_strategies(step: Step, shape: Sequence[int], kernels: Sequence[str] = ()) -> list[Strategy]:
    """Every strategy that a step whose target has this shape can run under.

    Args:
        kernels: of attention, besides the formula itself.
    """
    strategies = [s for kind in KINDS.values() for s in kind.offered(step.submodule, shape)]
    if step.submodule.attends:
        # Ever finer chunks save logits, of which such a kernel has none.
        able = [strategy for strategy in strategies if strategy.way.takes_kernels and strategy.n <= FEW]
        strategies += [replace(strategy, kernel=kernel) for kernel in kernels for strategy in able]
    return strategies


def opaque_strategies(step: Step, shape: Sequence[int], kind: str) -> list[Strategy]:
    """What a step can run under besides on that kind of device, but cannot be traced under."""
    compiled = [replace(WHOLE, kernel=COMPILED)]
    if not step.submodule.attends:
        return compiled
    kernels = kernels_for(kind, opaque=True)
    offered = offered_strategies(step, shape, kernels)
    return compiled + [strategy for strategy in offered if strategy.kernel in kernels]


def trace_step(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    trace: Trace,
    live: Iterable[str] | None = None,
    training: bool = True,
    in_place: bool = False,
    casting: Casting = nullcontext,
) -> StepCost:
    """Cost of one step under one strategy; call on tensors without data, inside `trace`.

    Args:
        live: tensors of the state that have a gradient when the step's backward begins; None for all.
        training: False for the discarding run alone.
        in_place: whether that run may write over its target.
        casting: what forward runs under, and backward does not.
    """
    base = trace.live_bytes
    numbers = range(LOSS_NUMBERS if training else 0)
    loss = [state[step.target].new_empty(NUMBER_BYTES, dtype=torch.uint8) for _ in numbers]
    loss_bytes = trace.live_bytes - base
    seed = 0 if step.submodule.training else None

    trace.reset()
    with torch.no_grad(), casting():
        output = run_discarded(step.submodule, strategy, step.tensors(state, constants, seed), in_place)
    discard_bytes, discard_work = trace.peak_bytes - base, trace.work()
    del output
    if not training:
        return StepCost(strategy, 0, 0, 0, discard_bytes, discard_work, Work(), Work())

    unread = None
    if not strategy.in_pieces and leaves_results_unread(step.submodule):
        trace.reset()
        with casting():
            run: Record = record_unread(step.submodule, strategy, step.tensors(state, constants, seed))
        unread = Forward(trace.peak_bytes - base + trace.kept_number_bytes, trace.work())
        del run

    trace.reset()
    with casting():
        if strategy.in_pieces:  # recorded or not, the same runs: it need not be traced twice
            run = record_unread(step.submodule, strategy, step.tensors(state, constants, seed))
        else:
            run, output = record(step.submodule, strategy, step.tensors(state, constants, seed))
            del output
    kept_bytes = trace.kept_number_bytes
    forward_bytes, forward_work = trace.peak_bytes - base + kept_bytes, trace.work()
    if strategy.in_pieces:
        forward_bytes, forward_work = discard_bytes, discard_work
    preserved_bytes = trace.live_bytes - base - loss_bytes + kept_bytes

    gradients = _gradients(step, state, state if live is None else live)
    trace.reset()
    result = run.vjp(gradients[step.target])
    backward_bytes, backward_work = trace.peak_bytes - base + kept_bytes, trace.work()
    del run, result, gradients, loss
    assert trace.live_bytes == base, f"{step.name} under {strategy} leaves tensors behind"
    of_bytes = forward_bytes, preserved_bytes, backward_bytes, discard_bytes
    works = discard_work, forward_work, backward_work
    in_graph = None
    if not strategy.in_pieces:
        in_graph = _as_written(step, strategy, state, constants, trace, live, casting)
    return StepCost(strategy, *of_bytes, *works, as_written=in_graph, unread=unread)


def _as_written(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    trace: Trace,
    live: Iterable[str] | None,
    casting: Casting,
) -> AsWritten:
    """The same in autograd's own graph, where parameters have gradients already."""
    trained = [parameter for parameter in step.submodule.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    base, submodule = trace.live_bytes, step.submodule
    loss = [state[step.target].new_empty(NUMBER_BYTES, dtype=torch.uint8) for _ in range(LOSS_NUMBERS)]
    tensors = step.tensors(state, constants, 0 if submodule.training else None)
    leaves = {name: tensors[name].detach().requires_grad_() for name in submodule.reads}
    trace.reset()
    with casting():
        kept, output = write(submodule, strategy, {**tensors, **leaves})
    kept_bytes = trace.kept_number_bytes
    root = LaterGradients.of([output])
    del output, tensors
    others = _gradients(step, state, state if live is None else live)
    del others[step.target]
    trace.reset()
    root.backward(inputs=[*leaves.values(), *trained])
    backward_bytes = trace.peak_bytes - base + kept_bytes
    del root, kept, leaves, others, loss
    for parameter in trained:
        parameter.grad = None
    return AsWritten(backward_bytes)


def _gradients(step: Step, state: Mapping[str, Tensor], live: Iterable[str]) -> dict[str, Tensor]:
    """Gradients that are there when a step's backward begins: that of its new target, whatever its shape."""
    target = state[step.target]
    gradients = {name: torch.empty_like(state[name]) for name in live}
    return gradients | {step.target: target.new_empty(step.submodule.new_shape(target.shape))}
