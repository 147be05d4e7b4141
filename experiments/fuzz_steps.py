"""A step of a fuzzer's case, and how two steps' results are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evoplan.experiments.fuzz_cases import Case, squares
from evoplan.model.context import autocast
from evoplan.model.loss import mean_square
from evoplan.planner.verify import TOLERANCES

TWICE = 2  # as far off as the plain model may a plan be, besides the tolerance

SEED = 5  # of dropout


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

    def prepare(self) -> None:
        """Allocate the parameters' gradients, as a plan counts on."""
        for parameter in self.parameters.values() if self.problem.training else ():
            parameter.grad = torch.zeros_like(parameter)

    def _forward(self) -> tuple[Tensor, ...]:
        return self.module(**self.inputs, dropout_seed=SEED)

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

    def live_bytes(self) -> int:
        """Bytes of parameters, their gradients and inputs: of a slice, what lies between its ends."""
        tensors = list(self.module.parameters())
        tensors += [p.grad for p in self.parameters.values() if p.grad is not None]
        return sum(t.nbytes for t in tensors) + sum(map(_extent_bytes, self.inputs.values()))


def _extent_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def difference(expected: Results, got: Results, precision: str, exact: Callable[[], Results]) -> str | None:
    """What is wrong with a planned step's results; None if nothing is.

    What overflows without the plan is not compared. Below double precision two ways to add up may both be
    off: there the plan's results may be twice as far from the exact ones as the plain model's, and the
    tolerance, and no more.

    Args:
        exact: computes those.
    """
    for name, gradient in expected.gradients.items():
        if (gradient is None) != (got.gradients[name] is None):
            there = ["none" if found.gradients[name] is None else "one" for found in (expected, got)]
            return f"gradient of {name}: {there[0]} without the plan, {there[1]} with it"
    tolerance = TOLERANCES[precision]
    expected = Results(
        {name: value for name, value in expected.values.items() if _finite(value)},
        {name: g for name, g in expected.gradients.items() if g is not None and _finite(g)},
    )
    worst, name = max(_errors(expected, got, expected), default=(0.0, ""))
    if worst <= tolerance:
        return None
    if precision != "float64":
        true = exact().only(expected)
        ours, theirs = (dict(map(reversed, _errors(true, found, true))) for found in (got, expected))
        worst, name = max((error - TWICE * theirs[name], name) for name, error in ours.items())
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
    return errors + [
        (_error(gradient, found.gradients[name], largest), f"gradient of {name}")
        for name, gradient in reference.gradients.items()
        if gradient is not None
    ]


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    error = float((a.double() - b.double()).abs().max())
    if error != error:
        return float("inf")
    return error / scale if error else 0.0
