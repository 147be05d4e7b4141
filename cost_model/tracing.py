"""Costs of the steps of a chain, as they are met: those that are kept, and those that are traced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from evoplan.cost_model.casting import casting_of
from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.kept_traces import KeptTraces
from evoplan.cost_model.loss import Loss, trace_loss
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.steps import StepCost, trace_step
from evoplan.cost_model.tensor_spec import TensorSpec
from evoplan.model.running.chain import Plannable, Step
from evoplan.model.running.internals import storage_key
from evoplan.model.running.strategy import Strategy

Specs = dict[str, TensorSpec]
# Of an argument: its dtype by name and its strides, where they are not as the model wants them.
Given = Mapping[str, tuple[str | None, tuple[int, ...] | None]]


class Here(NamedTuple):
    """What a step finds.

    Attributes:
        state, constants: all of the state, and the constants that the step reads.
        live: tensors of the state that have a gradient when the step's backward begins.
        in_place: whether a discarding run may write over its target.
    """

    state: Specs
    constants: Specs
    live: tuple[str, ...]
    in_place: bool


class Tracer:
    """Traces steps on the meta device; for autocast, which knows none, on fake tensors.

    Args:
        dtype: of parameters and state, by name.
        autocast: dtype by name that torch.autocast runs products in; None: as `dtype` says.
    """

    def __init__(self, device: Device, dtype: str, training: bool, autocast: str | None) -> None:
        self.device, self.dtype, self.training = device, getattr(torch, dtype), training
        self._kept = KeptTraces((device.kind, device.block_bytes, dtype, autocast, training))
        self._casting = casting_of(device.kind, autocast)
        self._where = "cpu" if autocast else "meta"

    def step(self, step: Step) -> Step:
        """The same step in the mode that is planned for, whichever the model is in."""
        submodule = copy.copy(step.submodule)
        submodule.training = self.training
        return replace(step, submodule=submodule)

    def costs(self, step: Step, strategies: Sequence[Strategy], here: Here) -> list[StepCost]:
        """Costs of a step under some strategies, without times."""
        about = step.names, step.reads, *here
        return self._kept.costs(step.submodule, about, strategies, partial(self._trace, step, here))

    def loss_bytes(self, loss: Loss, model: Plannable, state: Specs) -> int:
        """Most bytes that a loss of the model's results takes above the state.

        Raises:
            ValueError: it cannot be traced; says why.
        """
        with simulated(self.device) as trace:  # a loss may look at tensors that are on no meta device
            results = model.results({name: spec.empty("cpu") for name, spec in state.items()})
            return trace_loss(loss, results, trace, self._casting)

    def _trace(self, step: Step, here: Here, strategies: Sequence[Strategy]) -> list[StepCost]:
        with simulated(self.device, where=self._where) as trace:
            submodule = fake_copy(step.submodule, self.dtype, self._where).train(self.training)
            step = replace(step, submodule=submodule)
            state, constants = (
                {name: spec.empty(self._where) for name, spec in specs.items()}
                for specs in (here.state, here.constants)
            )
            return [
                trace_step(
                    step, strategy, state, constants, trace,
                    here.live, self.training, here.in_place, self._casting,
                )
                for strategy in strategies
            ]  # fmt: skip


def prepared(
    model: Plannable,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    device: Device,
    given: Given,
    donated: bool = False,
) -> tuple[Specs, Specs, int]:
    """The state that the chain starts from, its constants, and the bytes of both and of what was given.

    Args:
        donated: the state counts among its versions, and not here.
    """
    inputs = {
        name: _spec(shape, dtype, *given.get(name, (None, None))).empty("meta")
        for name, shape in shapes.items()
    }
    state, constants = model.prepare(**inputs)
    there = [*inputs.values(), *state.values(), *constants.values()]
    own = set(map(storage_key, state.values())) if donated else set()
    storages = [tensor.untyped_storage() for tensor in there if storage_key(tensor) not in own]
    sizes = {storage._cdata: device.in_blocks(storage.nbytes()) for storage in storages}
    specs = ({n: TensorSpec.of(t) for n, t in tensors.items()} for tensors in (state, constants))
    return *specs, sum(sizes.values())  # type: ignore[return-value]


def _spec(shape: Sequence[int], dtype: str, other: str | None, stride: tuple[int, ...] | None) -> TensorSpec:
    return TensorSpec.dense(shape, getattr(torch, other or dtype), stride)
