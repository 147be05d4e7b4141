"""Does a fitted model keep its promise? A step with and without the plan, measured and compared."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.cost_model import measure
from evoplan.model.foreign.as_they_were import own_copies, own_objects
from evoplan.model.running.internals import leaves_of, parametrizations_made_anew
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.unchanged import put_back
from evoplan.planner.checking.verify import PEAK_FLOOR, PEAK_TOLERANCE, TOLERANCES
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.fitting.plan import FitPlan
from evoplan.planner.fitting.problem import Fitting


@dataclass(frozen=True)
class FitVerification:
    """What was promised and what was found, of a whole training step.

    Attributes:
        unplanned_peak_bytes: of a step of the model as it is.
        static_bytes: of all three peaks: parameters, gradients, optimizer, inputs.
        max_loss_error: relative.
        max_gradient_error: of any parameter, the loss's own among them, or input; over the largest entry of
            any gradient.
        tolerances: what errors are held against.
        ok: whether they are within, and the peak within the budget.
    """

    budget_bytes: int | None
    predicted_peak_bytes: int
    measured_peak_bytes: int
    unplanned_peak_bytes: int
    static_bytes: int
    max_loss_error: float
    max_gradient_error: float
    tolerances: dict[str, float]
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


def verify_fit(
    fitting: Fitting, plan: FitPlan, patched: Patched, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> FitVerification:
    """Measure and compare; gradients and the model's buffers are left as they were."""
    model = fitting.model
    args, kwargs = own_copies((tuple(args), dict(kwargs)))
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _wants(leaf)]
    with _restored(model) as gradients, parametrizations_made_anew():
        step = _Step(fitting, args, dict(kwargs), leaves, gradients)
        planned_peak, planned_loss, planned = step.measured()
        patched.remove()
        try:
            plain_peak, plain_loss, plain = step.measured()
        finally:
            patched.install()
    static = sum(plan.static.values())
    measured, unplanned = static + planned_peak, static + plain_peak
    tolerance = TOLERANCES[_tolerance_of(plan.precision)]
    entries = (float(g.abs().max()) for g in plain.values() if g is not None and g.numel())
    largest = max(entries, default=1.0) or 1.0
    gradient_error = max((_apart(g, planned.get(of)) / largest for of, g in plain.items()), default=0.0)
    loss_error = _apart(plain_loss, planned_loss) / max(float(plain_loss.abs().max()), 1e-300)
    predicted = plan.predicted.peak_bytes
    checks = [
        abs(measured - predicted) <= max(PEAK_TOLERANCE * predicted, PEAK_FLOOR),
        plan.budget_bytes is None or measured <= plan.budget_bytes,
        loss_error <= tolerance,
        gradient_error <= tolerance,
    ]
    return FitVerification(
        budget_bytes=plan.budget_bytes,
        predicted_peak_bytes=predicted,
        measured_peak_bytes=measured,
        unplanned_peak_bytes=unplanned,
        static_bytes=static,
        max_loss_error=loss_error,
        max_gradient_error=gradient_error,
        tolerances={"peak": PEAK_TOLERANCE, "loss": tolerance, "gradient": tolerance},
        ok=all(checks),
    )


class _Step:
    """A training step that does the same every time; gradients of parameters stay allocated between.

    Args:
        gradients: that parameters have; those that are met are added, such as a head's in the loss.
    """

    def __init__(
        self,
        fitting: Fitting,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Tensor],
        gradients: dict[Tensor, Tensor | None],
    ) -> None:
        self.fitting, self.args, self.kwargs, self.leaves = fitting, args, kwargs, leaves
        self.gradients, self.met = gradients, list[Tensor]()
        self._looked, self._found = False, list[tuple[weakref.ref[Tensor], Tensor | None]]()
        self.trained = [p for p in fitting.model.parameters() if p.requires_grad]
        self.kind = self.trained[0].device.type if self.trained else "cpu"
        self.random = RandomState()
        self.inputs = [(t, t.detach().clone()) for t in pytree.tree_leaves((args, kwargs)) if _is_written(t)]
        self.buffers = {name: b.detach().clone() for name, b in fitting.model.named_buffers()}
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def begin(self) -> None:
        """Everything as before the first run."""
        for leaf in self.leaves:
            leaf.grad = None
        for parameter in (*self.trained, *self.met):
            assert parameter.grad is not None
            parameter.grad.zero_()
        put_back((buffer, self.buffers[name]) for name, buffer in self.fitting.model.named_buffers())
        put_back(self.inputs)

    def run(self) -> Tensor:
        """Forward, loss, backward; the output is held to the end, as a caller may."""
        with self.fitting.autocasting(self.kind):
            args, kwargs = own_objects((self.args, self.kwargs))  # which it may empty, or add to
            output = self.fitting.model(*args, **kwargs)
            loss = self.fitting.loss(output)
        if not self._looked:
            self._meet(leaves_of(loss))
        loss.backward()
        return loss.detach()

    def _meet(self, leaves: Iterable[Tensor]) -> None:
        """Those that are not the model's: their gradients stay allocated as well."""
        for leaf in leaves:
            if leaf not in self.gradients and not any(leaf is own for own in self.leaves):
                self._found.append((weakref.ref(leaf), leaf.grad))
                leaf.grad = torch.zeros_like(leaf)

    def _keep_met(self) -> None:
        """Of those, the ones that outlive a step: others the model has made itself, by cutting its graph."""
        self._looked = True
        for found, before in self._found:
            leaf = found()
            if leaf is not None:
                self.met.append(leaf)
                self.gradients[leaf] = before

    def measured(self) -> tuple[int, Tensor, dict[Tensor, Tensor | None]]:
        """Peak above what is there before, the loss, and all gradients."""
        self.begin()
        with self.random:
            loss = self.run()
        self._keep_met()
        of = (*self.trained, *self.leaves, *self.met)
        gradients = {tensor: None if tensor.grad is None else tensor.grad.clone() for tensor in of}
        self.begin()
        with self.random:
            peak = measure.peak_bytes(self.run, self.kind)
        return peak, loss, gradients


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[Tensor, Tensor | None]]:
    """Buffers, and gradients of parameters and of what is added to them, as they are now, afterwards."""
    gradients: dict[Tensor, Tensor | None] = {p: p.grad for p in model.parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield gradients
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        put_back((buffer, buffers[name]) for name, buffer in model.named_buffers())


def _is_written(leaf: Any) -> bool:
    """Whether a model may write into it."""
    return isinstance(leaf, Tensor) and not leaf.requires_grad


def _wants(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _tolerance_of(precision: str) -> str:
    name, _, mixed = precision.partition(" ")
    return {"bfloat16": "bf16-mixed", "float16": "fp16-mixed"}[name] if mixed else name


def _apart(a: Tensor | None, b: Tensor | None) -> float:
    """How far two gradients are from one another; NaN and one that is missing: beyond every tolerance."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    error = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return math.inf if math.isnan(error) else error
