"""The cost table: memory and work of every distinct step under every strategy it offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from cost_model.devices import Device, Link
from cost_model.liveness import INPUT, Liveness, Version
from cost_model.roofline import seconds
from cost_model.scratch import CpuScratch
from cost_model.trace import Trace, Work, fake_copy, fake_tensors
from model.chain import Chain, Step
from model.execution import record, run_discarded
from model.pieces import sampled_pieces
from model.strategy import WHOLE, Strategy
from model.submodule import IndependentAxis

# Piece counts offered, where the axis is that long. Long axes are cut into more chunks, down to such pieces:
# one attention map of 2,048 residues takes 16 MiB per head in float32.
PIECES = (2, 4, 8, 16, 32, 64)
MORE_CHUNKS, LEAST_LENGTH = (128, 256, 512), 8

# The loss, its parts and its gradient: a few numbers, live whenever a step runs again.
LOSS_NUMBERS, NUMBER_BYTES = 4, 128


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
        forward_seconds, backward_seconds: time of either; backward includes what it recomputes.
    """

    strategy: Strategy
    forward_bytes: int
    preserved_bytes: int
    backward_bytes: int
    discard_bytes: int
    forward_work: Work
    backward_work: Work
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    @property
    def inter_mem(self) -> int:
        """Peak of a forward and backward above what is preserved."""
        return max(self.forward_bytes, self.backward_bytes) - self.preserved_bytes

    def as_tuple(self) -> tuple[int, int, float]:
        """(inter_mem, preserved_mem, time): the projection that people read."""
        return self.inter_mem, self.preserved_bytes, self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class CostTable:
    """Costs of all steps of a chain.

    Attributes:
        options: for each step, its strategies' costs; equal steps share one tuple.
        step_reads: for each step, the state tensors it reads; the first is the one it rewrites.
        groups: steps of each block.
        state_bytes: size of each state tensor; a gradient has the size of its tensor.
        loss_bytes: peak that computing the loss and its gradient adds to what is live then.
        training: False where nothing is preserved.
        outputs: state tensors that are wanted at the end; None for all.
        units: steps that people take for one: a submodule and what leads in to it; empty: each for itself.
        input_bytes: what forward is given and the constants made from it, live throughout.
        host_bandwidth: bytes per second between the device and the host, either way; None where the state
            cannot wait there.
    """

    options: tuple[tuple[StepCost, ...], ...]
    step_reads: tuple[tuple[str, ...], ...]
    groups: tuple[range, ...]
    state_bytes: Mapping[str, int]
    loss_bytes: int
    training: bool
    outputs: tuple[str, ...] | None = None
    units: tuple[range, ...] = ()
    input_bytes: int = 0
    host_bandwidth: float | None = None

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """For each step, the state tensor it rewrites."""
        return tuple(names[0] for names in self.step_reads)

    @cached_property
    def liveness(self) -> Liveness:
        """Who holds which version of the state."""
        return Liveness(self.step_reads, self.outputs)

    def bytes_of(self, versions: Iterable[Version]) -> int:
        """Size of some versions of the state; the chain's inputs are not its own and count nothing."""
        return sum(self.state_bytes[name] for name, maker in versions if maker != INPUT)

    @cached_property
    def _gradient_bytes(self) -> tuple[int, ...]:
        positions = range(len(self.options) + 1)
        return tuple(sum(self.state_bytes[v.tensor] for v in self.liveness.alive(p)) for p in positions)

    def gradient_bytes(self, position: int) -> int:
        """Gradients that are live while backward stands before step `position`."""
        return self._gradient_bytes[position]


def offered_strategies(step: Step, shape: Sequence[int]) -> list[Strategy]:
    """Every strategy that a step whose target has this shape can run under."""
    submodule, strategies = step.submodule, [WHOLE]
    for axis in submodule.axes:
        if isinstance(axis, IndependentAxis):
            kind, size = "chunk", shape[axis.cuts[submodule.target]]
        else:
            kind, size = "coshard", axis.size
        strategies += [Strategy(kind, axis.name, n) for n in PIECES if n <= size]
        if kind == "chunk":
            strategies += [Strategy(kind, axis.name, n) for n in MORE_CHUNKS if n * LEAST_LENGTH <= size]
    return strategies


def trace_step(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    trace: Trace,
    live: Iterable[str] | None = None,
    training: bool = True,
    in_place: bool = False,
) -> StepCost:
    """Cost of one step under one strategy; call on fake tensors, inside `trace`.

    Args:
        live: tensors of the state that have a gradient when the step's backward begins; None for all.
        training: False for the discarding run alone.
        in_place: whether that run may write over its target.
    """
    base = trace.live_bytes
    loss = [torch.empty(NUMBER_BYTES, dtype=torch.uint8) for _ in range(LOSS_NUMBERS if training else 0)]
    loss_bytes = trace.live_bytes - base
    seed = 0 if step.submodule.training else None

    trace.reset()
    with torch.no_grad():
        output = run_discarded(step.submodule, strategy, step.tensors(state, constants, seed), in_place)
    discard_bytes, forward_work = trace.peak_bytes - base, trace.work()
    del output
    if not training:
        return StepCost(strategy, discard_bytes, 0, 0, discard_bytes, forward_work, Work())

    trace.reset()
    run, output = record(step.submodule, strategy, step.tensors(state, constants, seed))
    forward_bytes = trace.peak_bytes - base
    del output
    preserved_bytes = trace.live_bytes - base - loss_bytes

    gradients = {name: torch.empty_like(state[name]) for name in (state if live is None else live)}
    target = state[step.target]
    gradients[step.target] = target.new_empty(step.submodule.new_shape(target.shape))
    del target
    trace.reset()
    result = run.vjp(gradients[step.target])
    backward_bytes, backward_work = trace.peak_bytes - base, trace.work()
    del run, result, gradients, loss
    assert trace.live_bytes == base, f"{step.name} under {strategy} leaves tensors behind"
    return StepCost(
        strategy,
        forward_bytes,
        preserved_bytes,
        backward_bytes,
        discard_bytes,
        forward_work,
        backward_work,
    )


def build_cost_table(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    device: Device,
    training: bool = True,
    progress: Callable[[str], None] = lambda name: None,
    link: Link | None = None,
    strategies: Callable[[Step, Sequence[int]], Sequence[Strategy]] = offered_strategies,
) -> CostTable:
    """Trace every distinct step of a model under every strategy it offers.

    Args:
        model: its parameters may be on the meta device. One rank's share of a model costs what that rank's
            part does: no shard is longer than the first rank's.
        shapes: of forward's arguments by name: the state, and masks if they are given.
        dtype: of parameters and state, by name.
        progress: called with the name of each step as it is traced.
        link: what ranks talk over; None: the device's own.
        strategies: those to trace of a step whose target has a shape.
    """
    torch_dtype = getattr(torch, dtype)
    scratch = CpuScratch() if device.name == "cpu" else None
    with fake_tensors(), Trace(device.block_bytes, scratch) as trace, sampled_pieces(trace):
        model = fake_copy(model, torch_dtype).train(training)
        chain = Chain.of(model)
        before = trace.live_bytes
        tensors = {name: torch.empty(shape, dtype=torch_dtype) for name, shape in shapes.items()}
        state, constants = model.prepare(**tensors)
        input_bytes = trace.live_bytes - before
        del tensors
        state = {name: tensor.detach() for name, tensor in state.items()}
        largest = {name: tensor.nbytes for name, tensor in state.items()}
        step_reads = tuple(step.reads for step in chain.steps)
        liveness = Liveness(step_reads, chain.outputs)
        traced: dict[tuple, tuple[StepCost, ...]] = {}
        options = []
        for step in chain.steps:
            live = tuple(version.tensor for version in liveness.alive(step.index + 1))
            # What is live is so in the layout of the moment: ranks may share the state one way or another.
            shapes_now = tuple((name, tuple(tensor.shape)) for name, tensor in state.items())
            offered = tuple(strategies(step, state[step.target].shape))
            in_place = not training and liveness.owns_target(step.index)
            key = step.submodule.signature(), step.reads, live, shapes_now, offered, in_place
            if key not in traced:
                progress(step.name)
                costs = (
                    trace_step(step, strategy, state, constants, trace, live, training, in_place)
                    for strategy in offered
                )
                traced[key] = tuple(timed(cost, device, dtype, link) for cost in costs)
            options.append(traced[key])
            new_shape = step.submodule.new_shape(state[step.target].shape)
            if new_shape != state[step.target].shape:
                state[step.target] = torch.empty(new_shape, dtype=torch_dtype)
                largest[step.target] = max(largest[step.target], state[step.target].nbytes)
        state_bytes = {name: _rounded(size, device) for name, size in largest.items()}
    return CostTable(
        options=tuple(options),
        step_reads=step_reads,
        groups=chain.groups,
        state_bytes=state_bytes,
        # mean_square makes the gradients and nothing else.
        loss_bytes=sum(state_bytes[name] for name in chain.outputs)
        + LOSS_NUMBERS * _rounded(NUMBER_BYTES, device),
        training=training,
        outputs=chain.outputs,
        units=chain.units,
        input_bytes=input_bytes,
        host_bandwidth=device.host_bandwidth,
    )


def timed(cost: StepCost, device: Device, dtype: str, link: Link | None = None) -> StepCost:
    """The same cost with its times on a device, from the roofline."""
    return replace(
        cost,
        forward_seconds=seconds(cost.forward_work, device, dtype, link),
        backward_seconds=seconds(cost.backward_work, device, dtype, link),
    )


def _rounded(size: int, device: Device) -> int:
    return -(-size // device.block_bytes) * device.block_bytes
