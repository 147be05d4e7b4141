"""The cost table: memory, work and time of every distinct step under every strategy it offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from evoplan.cost_model.devices import Device
from evoplan.cost_model.liveness import Liveness, Version
from evoplan.cost_model.loss import Loss
from evoplan.cost_model.steps import LOSS_NUMBERS, NUMBER_BYTES, StepCost, offered_strategies
from evoplan.cost_model.tensor_spec import TensorSpec
from evoplan.cost_model.times import Roofline, TimeSource
from evoplan.cost_model.times_cache import MissingTimesError
from evoplan.cost_model.tracing import Given, Here, Specs, Tracer, prepared
from evoplan.model.running.chain import Chain, Plannable, Step
from evoplan.model.running.kernels import kernels_for
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy


@dataclass(frozen=True)
class CostTable:
    """Costs of all steps of a chain.

    Attributes:
        options: for each step, its strategies' costs; equal steps share one tuple.
        step_reads: for each step, the state tensors it reads.
        step_makes: for each step, the state tensors it makes or rewrites; None: the first that it reads.
        groups: steps of each block.
        state_bytes: size of each state tensor; a gradient has the size of its tensor.
        loss_bytes: peak that computing the loss and its gradient adds to what is live then.
        training: False where nothing is preserved.
        outputs: state tensors that are wanted at the end; None for all.
        units: steps that people take for one: a submodule and what leads in to it; empty: each for itself.
        input_bytes: what forward is given and the constants made from it, live throughout; where the state is
            donated, without the state.
        host_bandwidth: bytes per second between the device and the host, either way; None where the state
            cannot wait there.
        host_bytes: of host memory, for what training keeps for backward; 0: none of that waits there.
        donated: whether the chain owns the state that it starts from.
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
    host_bytes: int = 0
    step_makes: tuple[tuple[str, ...], ...] | None = None
    donated: bool = False

    @cached_property
    def makes(self) -> tuple[tuple[str, ...], ...]:
        """For each step, the state tensors it makes or rewrites."""
        return tuple(names[:1] for names in self.step_reads) if self.step_makes is None else self.step_makes

    @cached_property
    def liveness(self) -> Liveness:
        """Who holds which version of the state."""
        return Liveness(self.step_reads, self.outputs, self.makes, self.donated)

    def made_bytes(self, step: int) -> int:
        """Size of all that a step makes."""
        return sum(self.state_bytes[name] for name in self.makes[step])

    def bytes_of(self, versions: Iterable[Version]) -> int:
        """Size of some versions of the state; inputs that are not the chain's own count nothing."""
        return sum(self.state_bytes[v.tensor] for v in versions if self.liveness.owns(v))

    @cached_property
    def _gradient_bytes(self) -> tuple[int, ...]:
        positions = range(len(self.options) + 1)
        return tuple(sum(self.state_bytes[v.tensor] for v in self.liveness.alive(p)) for p in positions)

    @property
    def most_bytes(self) -> int:
        """More memory than any schedule needs, however it is rounded."""
        needs = (
            max(max(cost.forward_bytes, cost.backward_bytes, cost.discard_bytes) for cost in costs)
            for costs in self.options
        )
        return 2 * sum(needs) + self.loss_bytes + self.bytes_of(self.liveness.outputs)

    def gradient_bytes(self, position: int) -> int:
        """Gradients that are live while backward stands before step `position`."""
        return self._gradient_bytes[position]


def build_cost_table(
    model: Plannable,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    device: Device,
    training: bool = True,
    progress: Callable[[str], None] = lambda name: None,
    times: TimeSource | None = None,
    strategies: Callable[[Step, Sequence[int]], Sequence[Strategy]] | None = None,
    autocast: str | None = None,
    loss: Loss | None = None,
    given: Given | None = None,
    donated: bool = False,
) -> CostTable:
    """Trace every distinct step of a model under every strategy it offers.

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
        donated: whether the chain owns the state that it starts from, in inference.

    Raises:
        MissingTimesError: some step has no time under any strategy.
        ValueError: the loss cannot be traced; says why.
    """
    tracer, chain = Tracer(device, dtype, training, autocast), Chain.of(model)
    state, constants, input_bytes = prepared(model, shapes, dtype, device, given or {}, donated)
    sizes = {name: [spec.nbytes] for name, spec in state.items()}  # ranks' shards may change theirs

    def timed(step: Step, offered: Sequence[Strategy], here: Here) -> tuple[StepCost, ...]:
        progress(step.name)
        source = times or Roofline(device, dtype)
        return tuple(_timed(tracer.step(step), offered, here, tracer, source, strategies is None))

    offer = strategies or partial(_offered, device, training)
    liveness = Liveness([step.reads for step in chain.steps], chain.outputs, donated=donated)
    options = []
    for costs, target, changed in _walked(chain, liveness, state, constants, training, offer, timed):
        options.append(costs)
        sizes[target].append(changed.nbytes)
    state_bytes = {name: device.in_blocks(max(found)) for name, found in sizes.items()}
    # mean_square makes the gradients and nothing else.
    gradients = sum(state_bytes[name] for name in chain.outputs)
    own = 0 if loss is None or not training else tracer.loss_bytes(loss, model, state)
    return CostTable(
        options=tuple(options),
        step_reads=tuple(step.reads for step in chain.steps),
        groups=chain.groups,
        state_bytes=state_bytes,
        loss_bytes=max(gradients + LOSS_NUMBERS * device.in_blocks(NUMBER_BYTES), own),
        training=training,
        outputs=chain.outputs,
        units=chain.units,
        input_bytes=input_bytes,
        host_bandwidth=device.host_bandwidth,
        donated=donated,
    )


def _walked(
    chain: Chain,
    liveness: Liveness,
    state: Specs,
    constants: Specs,
    training: bool,
    offer: Callable[[Step, Sequence[int]], Sequence[Strategy]],
    timed: Callable[[Step, Sequence[Strategy], Here], tuple[StepCost, ...]],
) -> Iterator[tuple[tuple[StepCost, ...], str, TensorSpec]]:
    """Each step's costs, its target and what that is after it; equal steps are costed once.

    Args:
        state: that the chain starts from; the one that it ends with, afterwards.
    """
    known: dict[tuple[object, ...], tuple[StepCost, ...]] = {}
    for step in chain.steps:
        # What is live is so in the layout of the moment: ranks may share the state one way or another.
        here = Here(
            dict(state),
            {name: constants[name] for name in map(step.name_of, step.submodule.constants)},
            tuple(version.tensor for version in liveness.alive(step.index + 1)),
            not training and liveness.owns_target(step.index),
        )
        target = state[step.target]
        offered = tuple(offer(step, target.shape))
        key = step.submodule.signature(), step.reads, offered, repr(here)
        if key not in known:
            known[key] = timed(step, offered, here)
        new_shape = step.submodule.new_shape(target.shape)
        if new_shape != target.shape:
            state[step.target] = TensorSpec.dense(new_shape, target.dtype)
        yield known[key], step.target, state[step.target]


def _offered(device: Device, training: bool, step: Step, shape: Sequence[int]) -> list[Strategy]:
    offered = offered_strategies(step, shape, kernels_for(device.kind))
    return [strategy for strategy in offered if training or strategy.way.pays_in_inference]


def _timed(
    step: Step, offered: Sequence[Strategy], here: Here, tracer: Tracer, times: TimeSource, opaque: bool
) -> Iterator[StepCost]:
    """Costs under the strategies that there are times for, and under those that were measured whole."""
    read = {name: here.state[name].shape for name in step.reads}
    if not any(times.knows(step, read, strategy) for strategy in offered):
        raise MissingTimesError(f"{step.name}: no {times.name} time for its shapes")
    known = [strategy for strategy in offered if strategy == WHOLE or times.knows(step, read, strategy)]
    for cost in tracer.costs(step, known, here):
        yield times.timed(step, read, cost)
    if opaque:
        in_blocks = tracer.device.in_blocks
        gradients = sum(in_blocks(here.state[name].nbytes) for name in here.live)
        for cost in times.opaque(step, read, gradients + LOSS_NUMBERS * in_blocks(NUMBER_BYTES)):
            # Pieces that write over their target take less than was measured.
            if not (here.in_place and cost.strategy.in_pieces):
                yield cost
