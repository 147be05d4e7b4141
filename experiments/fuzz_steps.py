"""A step of a fuzzer's case, and how two steps' results are compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evoplan.experiments.fuzz_cases import Case, squares
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.context import autocast
from evoplan.planner.checking.verify import TOLERANCES
from evoplan.planner.execution.apply import PlannedModule

TWICE = 2  # as far off as the plain model may a plan be, besides the tolerance

NEARBY = 8  # inputs

SEED = 5  # of dropout, and of what is nearby


@dataclass(frozen=True)
class Results:
    """The loss, or the outputs of inference; gradients of inputs and parameters by name, None for none."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def finite(self) -> bool:
        """Whether nothing overflows."""
        tensors = [*self.values.values(), *self.gradients.values()]
        return all(t is None or _finite(t) for t in tensors)

    def only(self, others: Results) -> Results:
        """Those that others have, too."""
        values = {name: self.values[name] for name in others.values}
        return Results(values, {name: self.gradients[name] for name in others.gradients})


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


class FuzzStep:
    """A training or inference step, with or without a plan."""

    def __init__(self, case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.case, self.module, self.inputs = case, module, inputs
        self.problem = case.family.problem
        self.autocast = self.problem.autocast
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.leaves = {name: inputs[name] for name in case.differentiated}
        donated = isinstance(module, PlannedModule) and module.donated
        self.taken = set(self.problem.state_shapes()) if donated else set()

    def prepare(self) -> None:
        """Allocate the parameters' gradients, as a plan counts on."""
        for parameter in self.parameters.values() if self.problem.training else ():
            parameter.grad = torch.zeros_like(parameter)

    def _forward(self) -> tuple[Tensor, ...]:
        given = {name: x.clone() if name in self.taken else x for name, x in self.inputs.items()}
        outputs: tuple[Tensor, ...] = self.module(**given, dropout_seed=SEED)
        return outputs

    def _loss(self, outputs: tuple[Tensor, ...]) -> Tensor:
        if self.case.family.own_loss:
            return squares(outputs)
        return mean_square(*(outputs[self.case.outputs.index(name)] for name in self.case.reach))

    def run(self) -> None:
        """The step; gradients of inputs do not outlive it."""
        if not self.problem.training:
            with torch.no_grad(), autocast("cpu", self.autocast):
                self._forward()
            return
        self._drop_gradients()
        with autocast("cpu", self.autocast):
            outputs = self._forward()  # held to the end, as a caller may
            loss = self._loss(outputs)
        if loss.requires_grad:
            loss.backward()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for tensor in self.leaves.values():
            tensor.grad = None

    def results(self) -> Results:
        """What a step makes."""
        if not self.problem.training:
            with torch.no_grad(), autocast("cpu", self.autocast):
                return Results(dict(zip(self.case.outputs, self._forward(), strict=True)), {})
        leaves = {**self.leaves, **self.parameters}
        for leaf in leaves.values():
            leaf.grad = None
        with autocast("cpu", self.autocast):
            loss = self._loss(self._forward())
        if loss.requires_grad:
            loss.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        return Results({"loss": loss.detach()}, gradients)

    def exact(self) -> Results:
        """What it would make in double precision, from the same numbers."""
        inputs = {
            name: tensor.detach().double() if name in self.problem.state_shapes() else tensor
            for name, tensor in self.inputs.items()
        }
        for name in self.leaves:
            inputs[name].requires_grad_()
        step = FuzzStep(self.case, copy.deepcopy(self.module).double(), inputs)
        step.autocast = None
        return step.results()

    def nearby(self) -> Iterator[Results]:
        """What it makes of inputs that are some of them a rounding away.

        A step may be ill-conditioned: a normalisation over three channels that are nearly equal turns the
        last bit of one into anything. What such inputs do to the plain model, another order of sums may do.
        """
        generator = torch.Generator().manual_seed(SEED)
        given = self.inputs
        for _ in range(NEARBY):
            self.inputs = {name: _shaken(tensor, generator) for name, tensor in given.items()}
            self.leaves = {name: self.inputs[name] for name in self.leaves}
            yield self.results()
        self.inputs, self.leaves = given, {name: given[name] for name in self.leaves}

    def live_bytes(self) -> int:
        """Bytes of parameters, gradients and inputs that are not taken: of a slice, what it spans."""
        tensors: list[Tensor] = list(self.module.parameters())
        tensors += [p.grad for p in self.parameters.values() if p.grad is not None]
        inputs = (tensor for name, tensor in self.inputs.items() if name not in self.taken)
        return sum(t.nbytes for t in tensors) + sum(map(_extent_bytes, inputs))


def _shaken(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """With a third of its entries a rounding up, and a third a rounding down; a mask is as it was."""
    if not tensor.requires_grad and bool(((tensor == 0) | (tensor == 1)).all()):
        return tensor
    by = torch.randint(-1, 2, tensor.shape, generator=generator) * torch.finfo(tensor.dtype).eps
    shaken = tensor.detach() * (1 + by.to(tensor.dtype))
    return shaken.requires_grad_(tensor.requires_grad)


def _extent_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def difference(expected: Results, got: Results, precision: str, plain: FuzzStep) -> str | None:
    """What is wrong with a planned step's results; None if nothing is.

    What overflows without the plan is not compared. Below double precision two ways to add up may both be
    off: there the plan's results may be twice as far from the exact ones as the plain model's are, from
    these inputs or nearby ones, and the tolerance, and no more.
    """
    for name, gradient in expected.gradients.items():
        if (gradient is None) != (got.gradients[name] is None):
            there = ["none" if found.gradients[name] is None else "one" for found in (expected, got)]
            return f"gradient of {name}: {there[0]} without the plan, {there[1]} with it"
    tolerance, allowed = TOLERANCES[precision], dict[str, float]()
    expected = Results(
        {name: value for name, value in expected.values.items() if _finite(value)},
        {name: g for name, g in expected.gradients.items() if g is not None and _finite(g)},
    )
    worst, name = max(_errors(expected, got, expected), default=(0.0, ""))
    if worst <= tolerance:
        return None
    if precision != "float64":
        true = plain.exact().only(expected)
        ours = {name: error for error, name in _errors(true, got, true)}
        for theirs in (expected, *plain.nearby()):
            for error, name in _errors(true, theirs, true):
                allowed[name] = max(allowed.get(name, 0.0), TWICE * error)
        worst, name = max((error - allowed[name], name) for name, error in ours.items())
        if worst <= tolerance:
            return None
    return f"{name} is off by {worst:.2e} of the largest entry, {tolerance:.0e} allowed"


def _errors(reference: Results, found: Results, scale: Results) -> list[tuple[float, str]]:
    """The largest error of each value, and of each gradient over the largest entry of any, with its name."""
    largest = max((float(g.abs().max()) for g in scale.gradients.values() if g is not None), default=0.0)
    errors = [
        (_error(value, found.values[name], float(value.abs().max())), name)
        for name, value in reference.values.items()
    ]
    for name, gradient in reference.gradients.items():
        if gradient is not None:
            theirs = found.gradients[name]
            assert theirs is not None  # where the one has a gradient, the other has
            errors.append((_error(gradient, theirs, largest), f"gradient of {name}"))
    return errors


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    error = float((a.double() - b.double()).abs().max())
    if error != error:
        return float("inf")
    return error / scale if error else 0.0
