"""The cost table: memory, work and time of every distinct step under every strategy it offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from evoplan.cost_model.devices import Device
from evoplan.cost_model.kept_traces import KeptTraces
from evoplan.cost_model.liveness import INPUT, Liveness, Version
from evoplan.cost_model.loss import Loss, trace_loss
from evoplan.cost_model.scratch import CpuScratch
from evoplan.cost_model.steps import LOSS_NUMBERS, NUMBER_BYTES, StepCost, offered_strategies, trace_step
from evoplan.cost_model.times import MissingTimesError, Roofline, TimeSource
from evoplan.cost_model.trace import Trace, casting_of, fake_copy, fake_tensors
from evoplan.model.chain import Chain, Step
from evoplan.model.kernels import kernels_for
from evoplan.model.pieces import sampled_pieces
from evoplan.model.strategy import WHOLE, Strategy


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


def build_cost_table(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    device: Device,
    training: bool = True,
    progress: Callable[[str], None] = lambda name: None,
    times: TimeSource | None = None,
    strategies: Callable[[Step, Sequence[int]], Sequence[Strategy]] | None = None,
    autocast: str | None = None,
    loss: Loss | None = None,
    given: Mapping[str, tuple[str | None, tuple[int, ...] | None]] | None = None,
) -> CostTable:
    """Trace every distinct step of a model under every strategy it offers.

    Tensors are on the meta device; for autocast, which knows none such, they are fake ones, which take three
    times as long.

    Args:
        model: its parameters may be on the meta device. One rank's share of a model costs what that rank's
            part does: no shard is longer than the first rank's.
        shapes: of forward's arguments by name: the state, and masks if they are given.
        dtype: of parameters and state, by name.
        progress: called with the name of each step as it is traced.
        times: the device's roofline if not given; strategies that have none are left out, except `whole`.
        strategies: those to trace of a step whose target has a shape; all there are if not given.
        loss: of forward's results; the mean of their squares if not given.
        given: dtype by name and strides of arguments where they are not as the model wants them.
        autocast: dtype by name that torch.autocast runs products in; None: as `dtype` says.

    Raises:
        MissingTimesError: some step has no time under any strategy.
        ValueError: the loss cannot be traced; says why.
    """
    times = times or Roofline(device, dtype)
    traced_here = partial(offered_strategies, kernels=kernels_for(device.kind))
    torch_dtype = getattr(torch, dtype)
    scratch, casting = CpuScratch() if device.kind == "cpu" else None, casting_of(device.kind, autocast)
    kept = KeptTraces((device.kind, device.block_bytes, dtype, autocast, training))
    where = "cpu" if autocast else "meta"
    with (
        fake_tensors() if autocast else nullcontext(),
        Trace(device.block_bytes, scratch) as trace,
        sampled_pieces(trace),
    ):
        chain = Chain.of(model)
        before = trace.live_bytes
        tensors = {
            name: made_like(where, shape, torch_dtype, *(given or {}).get(name, (None, None)))
            for name, shape in shapes.items()
        }
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
            offered = tuple((strategies or traced_here)(step, state[step.target].shape))
            if strategies is None and not training:  # nothing is kept: lean is whole
                offered = tuple(strategy for strategy in offered if strategy.kind != "lean")
            in_place = not training and liveness.owns_target(step.index)
            key = step.submodule.signature(), step.reads, live, shapes_now, offered, in_place
            if key not in traced:
                progress(step.name)
                step = replace(step, submodule=fake_copy(step.submodule, torch_dtype, where).train(training))
                read = {name: tuple(state[name].shape) for name in step.reads}
                known = [s for s in offered if s == WHOLE or times.knows(step, read, s)]
                if not any(times.knows(step, read, strategy) for strategy in known):
                    raise MissingTimesError(f"{step.name}: no {times.name} time for its shapes")
                constants_read = {n: constants[step.name_of(n)] for n in step.submodule.constants}
                traced_costs = kept.costs(
                    step.submodule,
                    (step.names, step.reads, live, in_place, _layouts(constants_read), _layouts(state)),
                    known,
                    partial(
                        trace_step, step, state=state, constants=constants, trace=trace, live=live,
                        training=training, in_place=in_place, casting=casting,
                    ),
                )  # fmt: skip
                found = [times.timed(step, read, cost) for cost in traced_costs]
                if strategies is None:
                    gradients = sum(_rounded(state[name].nbytes, device) for name in live)
                    numbers = LOSS_NUMBERS * _rounded(NUMBER_BYTES, device)
                    opaque = times.opaque(step, read, gradients + numbers)
                    # Pieces that write over their target take less than was measured.
                    found += [cost for cost in opaque if not (in_place and cost.strategy.in_pieces)]
                traced[key] = tuple(found)
            options.append(traced[key])
            new_shape = step.submodule.new_shape(state[step.target].shape)
            if new_shape != state[step.target].shape:
                state[step.target] = state[step.target].new_empty(new_shape)
                largest[step.target] = max(largest[step.target], state[step.target].nbytes)
        state_bytes = {name: _rounded(size, device) for name, size in largest.items()}
        # mean_square makes the gradients and nothing else.
        loss_bytes = sum(state_bytes[name] for name in chain.outputs)
        loss_bytes += LOSS_NUMBERS * _rounded(NUMBER_BYTES, device)
        layouts = _layouts(state)
    if loss is not None and training:
        with fake_tensors(), Trace(device.block_bytes, scratch) as trace:
            state = {name: torch.empty(shape, dtype=dtype) for name, (shape, _, dtype) in layouts.items()}
            loss_bytes = max(loss_bytes, trace_loss(loss, model.results(state), trace, casting))
    return CostTable(
        options=tuple(options),
        step_reads=step_reads,
        groups=chain.groups,
        state_bytes=state_bytes,
        loss_bytes=loss_bytes,
        training=training,
        outputs=chain.outputs,
        units=chain.units,
        input_bytes=input_bytes,
        host_bandwidth=device.host_bandwidth,
    )


def _layout(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: _layout(tensor) for name, tensor in tensors.items()}


def _rounded(size: int, device: Device) -> int:
    return -(-size // device.block_bytes) * device.block_bytes


def made_like(
    where: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    other: str | None = None,
    stride: Sequence[int] | None = None,
) -> Tensor:
    """A tensor of that shape; in another dtype by name, and with other strides, where these are given."""
    dtype = getattr(torch, other) if other else dtype
    if stride is None:
        return torch.empty(shape, dtype=dtype, device=where)
    return torch.empty_strided(shape, stride, dtype=dtype, device=where)
