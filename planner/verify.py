"""Does a plan keep its promise? Apply it, measure it, compare it with the model without a plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from cost_model import measure
from cost_model.scratch import CpuScratch
from cost_model.trace import Trace, fake_copy, fake_tensors
from model.config import ModelConfig, TrunkConfig
from model.loss import mean_square
from model.pieces import sampled_pieces
from model.trunk import build_model
from planner.apply import PlannedModule
from planner.host import FakeHost
from planner.plan import Plan
from planner.planning import device_named, empty_stack

# Largest error of the loss (relative) and of any gradient (over the largest gradient entry).
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
PEAK_TOLERANCE = 0.02  # of the predicted peak
PEAK_FLOOR = 4096  # bytes; models of a few kilobytes are mostly odds and ends


@dataclass(frozen=True)
class Verification:
    """What was promised and what was found. None: could not be had."""

    backend: str
    budget_bytes: int | None
    predicted_peak_bytes: int
    measured_peak_bytes: int
    static_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float | None
    unplanned_peak_bytes: int | None
    unplanned_step_seconds: float | None
    max_loss_error: float | None
    max_gradient_error: float | None
    tolerances: dict[str, float]
    ok: bool

    def to_json(self) -> dict:
        """The same as plain types."""
        return asdict(self)


def apply_plan(stack: nn.Module, plan: Plan) -> PlannedModule:
    """The stack under the plan: same parameters, same outputs.

    Raises:
        ValueError: the plan is for another model.
    """
    config = getattr(stack, "config", None)
    if config is None or without_rates(config) != without_rates(plan.problem.config):
        raise ValueError(
            f"the plan is for {plan.problem.config}, the model has {config}; plan for this model"
        )
    dtype = next(stack.parameters()).dtype
    if str(dtype) != f"torch.{plan.problem.dtype}":
        raise ValueError(
            f"the plan is for {plan.problem.dtype}, the model is in {dtype}; plan for that dtype"
        )
    return PlannedModule(stack, plan.sequence(), plan.problem.state_shapes())


def without_rates(config: ModelConfig) -> ModelConfig:
    """The model with one rate wherever it drops: memory asks whether there is a mask, not how dense it is."""

    def dropping(rate: float) -> float:
        return 0.5 if rate else 0.0

    if isinstance(config, TrunkConfig):
        return TrunkConfig(without_rates(config.extra), without_rates(config.main))
    return replace(
        config, dropout_msa=dropping(config.dropout_msa), dropout_pair=dropping(config.dropout_pair)
    )


def simulate_plan(plan: Plan) -> Verification:
    """Run the applied plan on fake tensors: its memory, without using any."""
    problem = plan.problem
    where = device_named(problem.device)
    dtype = getattr(torch, problem.dtype)
    scratch = CpuScratch() if where.name == "cpu" else None
    with fake_tensors(), Trace(where.block_bytes, scratch) as trace, sampled_pieces(trace):
        stack = fake_copy(empty_stack(problem.config), dtype).train(problem.training)
        before = trace.live_bytes
        step = _Step(PlannedModule(stack, plan.sequence(), host=FakeHost), plan, dtype, "cpu")
        # What is there before the step: as live as in a real run, except the optimizer's states.
        trace.reset()
        step.run()
        peak = trace.peak_bytes - before
    static = sum(plan.static.values())
    live_before = sum(plan.static[name] for name in ("parameters", "optimizer", "workspace"))
    return _judged(plan, "simulated", live_before + peak, static, None, None, None, None, None)


def verify_plan(
    stack: nn.Module | None,
    plan: Plan,
    repeats: int = 3,
    unplanned: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Run the plan for real on this machine and compare it with the model without a plan.

    Args:
        stack: the model; a random one is made when None.
        repeats: timed runs of each, interleaved; medians are reported.
        unplanned: also run the model without the plan, where it fits.

    Raises:
        ValueError: the plan needs more memory than this machine has.
    """
    problem = plan.problem
    kind = "cuda" if problem.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, problem.dtype)
    available = available_bytes(kind)
    if plan.predicted.peak_bytes > available:
        raise ValueError(
            f"the plan needs {plan.predicted.peak_bytes} bytes, this machine has {available} free; "
            "use --simulate, or --blocks to shorten the stack"
        )
    if stack is None:
        progress("making the model")
        stack = random_stack(plan, dtype, kind)
    step = _Step(apply_plan(stack, plan), plan, dtype, kind)
    progress("running the plan")
    step.run()
    live_before = step.live_bytes() + plan.static["optimizer"] + plan.static["workspace"]
    progress("measuring its memory")
    peak = live_before + measure.peak_bytes(step.run, kind)

    plain, plain_peak, loss_error, gradient_error = None, None, None, None
    if unplanned and plan.baselines["none"].peak_bytes <= available:
        progress("running without the plan")
        plain = _Step(stack, plan, dtype, kind, inputs=step.inputs)
        loss_error, gradient_error = _errors(plain, step)
        progress("measuring its memory")
        plain_peak = live_before + measure.peak_bytes(plain.run, kind)
    times: dict[str, list[float]] = {"planned": [], "plain": []}
    for index in range(repeats):  # interleaved: the machine's speed drifts
        progress(f"timing {index + 1}/{repeats}")
        times["planned"].append(measure.seconds(step.run, kind))
        if plain is not None:
            times["plain"].append(measure.seconds(plain.run, kind))
    return _judged(
        plan,
        f"{kind}-allocator",
        peak,
        sum(plan.static.values()),
        median(times["planned"]),
        plain_peak,
        median(times["plain"]) if plain is not None else None,
        loss_error,
        gradient_error,
    )


def random_stack(plan: Plan, dtype: torch.dtype, kind: str) -> nn.Module:
    """A model with no weight zero, as after some training: zeros would hide errors."""
    torch.manual_seed(0)
    stack = build_model(plan.problem.config).train(plan.problem.training)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * max(parameter.shape) ** -0.5)
    return stack.to(kind, dtype)


def available_bytes(kind: str) -> int:
    """Memory that a run here may take."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Step:
    """One training (or inference) step of a stack on inputs with random masks."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        dtype: torch.dtype,
        kind: str,
        inputs: dict[str, Tensor] | None = None,
    ) -> None:
        self.module, self.training = module, plan.problem.training
        if inputs is None:
            shapes = plan.problem.state_shapes()
            inputs = {name: torch.randn(shape, dtype=dtype, device=kind) for name, shape in shapes.items()}
            for name, of in plan.problem.config.masks.items():
                present = torch.rand(shapes[of][:-1], device=kind) > 0.1
                inputs[name] = present.to(dtype)
        self.inputs = inputs
        self.state = [inputs[name] for name in plan.problem.state_shapes()]
        if self.training:
            for tensor in self.state:
                tensor.requires_grad_()
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def run(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.module(**self.inputs)
            return
        self.drop_gradients()
        m, z = self.module(**self.inputs, dropout_seed=0)  # the same masks every time
        mean_square(m, z).backward()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Those of the inputs; the model's stay allocated."""
        for tensor in self.state:
            tensor.grad = None

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """(loss or outputs, gradients of inputs and parameters) of a step, gradients started at zero."""
        if not self.training:
            with torch.no_grad():
                return [x.double() for x in self.module(**self.inputs)], []
        parameters = list(self.module.parameters())
        loss = mean_square(*self.module(**self.inputs, dropout_seed=0))
        leaves = [*self.state, *parameters]
        return [loss.detach().double()], list(torch.autograd.grad(loss, leaves))

    def live_bytes(self) -> int:
        """Bytes of parameters, gradients and inputs."""
        tensors = [*self.module.parameters(), *self.inputs.values()]
        if self.training:
            tensors += [parameter.grad for parameter in self.module.parameters()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _errors(plain: _Step, planned: _Step) -> tuple[float, float | None]:
    expected, gradients = plain.results()
    got, planned_gradients = planned.results()
    loss_error = max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
        for a, b in zip(expected, got, strict=True)
    )
    if not gradients:
        return loss_error, None
    largest = max(float(g.abs().max()) for g in gradients)
    differences = (
        float((a.double() - b.double()).abs().max())
        for a, b in zip(gradients, planned_gradients, strict=True)
    )
    return loss_error, max(differences) / largest


def _judged(
    plan: Plan,
    backend: str,
    peak: int,
    static: int,
    step_seconds: float | None,
    plain_peak: int | None,
    plain_seconds: float | None,
    loss_error: float | None,
    gradient_error: float | None,
) -> Verification:
    numerics = TOLERANCES[plan.problem.dtype]
    budget, predicted = plan.problem.budget_bytes, plan.predicted.peak_bytes
    checks = [
        abs(peak - predicted) <= max(PEAK_TOLERANCE * predicted, PEAK_FLOOR),
        budget is None or peak <= budget,
        loss_error is None or loss_error <= numerics,
        gradient_error is None or gradient_error <= numerics,
    ]
    return Verification(
        backend=backend,
        budget_bytes=budget,
        predicted_peak_bytes=predicted,
        measured_peak_bytes=peak,
        static_bytes=static,
        predicted_step_seconds=plan.predicted.step_seconds,
        measured_step_seconds=step_seconds,
        unplanned_peak_bytes=plain_peak,
        unplanned_step_seconds=plain_seconds,
        max_loss_error=loss_error,
        max_gradient_error=gradient_error,
        tolerances={"peak": PEAK_TOLERANCE, "loss": numerics, "gradient": numerics},
        ok=all(checks),
    )
