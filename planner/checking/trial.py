"""One training (or inference) step of a model on random data, to measure and to compare."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from evoplan.cost_model.allocator import give_back_freed_memory
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.loss import Loss
from evoplan.model.build import build_model
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.chain import Plannable
from evoplan.model.running.context import autocast
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.problems.costing import device_of
from evoplan.planner.problems.problem import Given, Problem


def random_stack(problem: Problem, kind: str) -> Plannable:
    """A model with no weight zero, as after some training: zeros would hide errors."""
    torch.manual_seed(0)
    stack = build_model(problem.config).train(problem.training)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * max(parameter.shape) ** -0.5)
    return stack.to(kind, getattr(torch, problem.dtype))


def random_inputs(
    problem: Problem, shapes: Mapping[str, tuple[int, ...]], kind: str = "cpu"
) -> dict[str, Tensor]:
    """Forward's arguments by name: a normal state, and masks in which a tenth is missing."""
    inputs, others = {}, {given.name: given for given in problem.given}
    for name, shape in shapes.items():
        given = others.get(name, Given(name=name))
        dtype = getattr(torch, given.dtype or problem.dtype)
        is_mask = name in problem.config.masks
        values = torch.randn(shape, dtype=torch.float32 if is_mask else dtype, device=kind)
        values = (values > -1.3).to(dtype) if is_mask else values
        inputs[name] = values if given.stride is None else _laid_out(values, given.stride)
    return inputs


def inputs_between_steps(problem: Problem, kind: str) -> dict[str, Tensor]:
    """All of them; a state that steps take waits on the host, and each step has a copy on the device."""
    state = random_inputs(problem, problem.state_shapes(), "cpu" if problem.donate else kind)
    return state | random_inputs(problem, problem.mask_shapes(), kind)


def _laid_out(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The values in a tensor with these strides; where one is 0, those at the first index count."""
    first = tuple(slice(1) if step == 0 else slice(None) for step in stride)
    kept = values[first]
    inner = kept.new_empty_strided(kept.shape, stride).copy_(kept)
    return inner.expand(values.shape)


def kind_here(problem: Problem) -> str:
    """Where a problem's plan runs on this machine: cuda, or cpu for want of a GPU."""
    return "cuda" if device_of(problem).kind == "cuda" and torch.cuda.is_available() else "cpu"


def available_bytes(kind: str) -> int:
    """Memory that a run here may take."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    give_back_freed_memory()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Trial:
    """A step that can be run again and again; gradients of parameters stay allocated between.

    Args:
        module: the model, planned or not. One that takes the state that it is given gets copies.
        inputs: forward's arguments by name; those of the state get gradients.
        share: the rank's share that `module` runs, where ranks share the model.
        loss: of the results; the mean of their squares if not given.
    """

    def __init__(
        self,
        module: Plannable | PlannedModule,
        problem: Problem,
        inputs: dict[str, Tensor],
        share: ParallelEvoformer | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.module, self.training, self.share, self.inputs = module, problem.training, share, inputs
        self.donated = isinstance(module, PlannedModule) and module.donated
        kind = next(module.parameters()).device.type
        self.casting: Casting = partial(autocast, kind, problem.autocast)
        self.own_loss = loss
        whole = problem.state_shapes()
        self.state = {name: inputs[name] for name in whole}
        stack = module.stack if isinstance(module, PlannedModule) else module
        self.counts = tuple(torch.Size(whole[name]).numel() for name in stack.outputs)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self.training:
            for tensor in self.state.values():
                tensor.requires_grad_()
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def given(self) -> dict[str, Tensor]:
        """Forward's arguments: of a state that is taken, copies on the module's device, part of the step."""
        if not self.donated:
            return self.inputs
        device = next(self.module.parameters()).device
        return {
            name: tensor.to(device, copy=True) if name in self.state else tensor
            for name, tensor in self.inputs.items()
        }

    def outputs(self) -> tuple[Tensor, ...]:
        """The results, with the same dropout every time."""
        outputs: tuple[Tensor, ...] = self.module(**self.given(), dropout_seed=0)
        return outputs

    def loss(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """A loss of every entry of the results; of several ranks, this one's part of their sum."""
        if self.own_loss is not None:
            return self.own_loss(outputs)
        return mean_square(*outputs, counts=self.counts)

    def run(self) -> None:
        """The step."""
        if not self.training:
            with torch.no_grad(), self.casting():
                self.module(**self.given())
            return
        self._drop_gradients()
        with self.casting():  # backward outside, as torch has it
            outputs = self.outputs()  # held to the end, as a caller may
            loss = self.loss(outputs)
        loss.backward()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Those of the inputs; the model's stay allocated."""
        for tensor in self.state.values():
            tensor.grad = None

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """(the loss, or the outputs; gradients of the state and of the parameters) of a step.

        Of several ranks the loss and the parameters' gradients are the sums.
        """
        if not self.training:
            with torch.no_grad(), self.casting():
                return list(self.module(**self.given())), []
        leaves = [*self.state.values(), *self.parameters]
        with self.casting():
            loss = self.loss(self.outputs())
        gradients = list(torch.autograd.grad(loss, leaves))
        loss = loss.detach()
        if self.share is not None:
            for total in (loss, *gradients[len(self.state) :]):
                self.share.ranks.sum_(total)
        return [loss], gradients

    def live_bytes(self) -> int:
        """Bytes of parameters, gradients and inputs that are there between steps; taken ones are not."""
        inputs = (x for name, x in self.inputs.items() if not (self.donated and name in self.state))
        tensors = [*self.module.parameters(), *inputs]
        if self.training:
            tensors += [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def beyond_rounding(plain: Trial, planned: Trial, problem: Problem) -> float:
    """How much further a planned step's gradients are from single precision's than the plain step's are.

    For half precision, where two ways to add up are both off: on a CPU torch's bfloat16 sum over a few
    thousand positions, of a normalisation's bias gradient, may be wrong by a quarter of the largest entry. Of
    each tensor the largest error, less the plain step's; over the largest entry of any gradient.
    """
    inputs = {name: tensor.detach().float() for name, tensor in plain.inputs.items()}
    exact = Trial(
        copy.deepcopy(plain.module).float(),
        problem.model_copy(update={"dtype": "float32", "mixed": None}),
        inputs,
    )
    gradients = [trial.results()[1] for trial in (exact, plain, planned)]
    largest = max(float(g.abs().max()) for g in gradients[0])
    excess = []
    for true, without, under in zip(*gradients, strict=True):
        excess.append(_apart(under, true) - _apart(without, true))
    return max(0.0, *map(_counted, excess)) / largest


def errors(plain: Trial, planned: Trial) -> tuple[float, float | None]:
    """How far a planned step is from the plain one: of the loss or outputs (relative), of the gradients.

    The latter over the largest entry of any gradient; None in inference. Of several ranks, this one's share.
    """
    expected, gradients = plain.results()
    got, planned_gradients = planned.results()
    share = planned.share
    if share is not None:
        parts, cuts = (gradients, share.input_cuts) if gradients else (expected, share.output_cuts)
        for index, name in enumerate(planned.state if gradients else share.outputs):
            parts[index] = share.ranks.own(parts[index], cuts[name])
    loss_error = max(
        _counted(_apart(a, b) / max(float(a.double().abs().max()), 1e-300))
        for a, b in zip(expected, got, strict=True)
    )
    if not gradients:
        return loss_error, None
    largest = max(float(g.abs().max()) for g in gradients)
    differences = (_apart(a, b) for a, b in zip(gradients, planned_gradients, strict=True))
    return loss_error, max(_counted(difference / largest) for difference in differences)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _counted(error: float) -> float:
    """NaN, which any comparison passes over, as what it is: beyond every tolerance."""
    return math.inf if math.isnan(error) else error
