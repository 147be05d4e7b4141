"""Does a plan keep its promise? Apply it, measure it, compare it with the model without a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from evoplan.cost_model import measure
from evoplan.cost_model.casting import casting_of
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.loss import Loss
from evoplan.cost_model.simulation import simulated
from evoplan.model.build import build_model
from evoplan.model.running.chain import Plannable
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.model.sharing.ranks import Ranks
from evoplan.planner.checking.trial import (
    Trial,
    available_bytes,
    beyond_rounding,
    errors,
    inputs_between_steps,
    kind_here,
    random_inputs,
    random_stack,
)
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.applying import apply_plan, check_model
from evoplan.planner.execution.host import FakeHost
from evoplan.planner.plans.plan import Plan, check_plan
from evoplan.planner.problems.costing import device_of, input_shapes, planned_model
from evoplan.planner.problems.problem import MEAN_SQUARE, Problem
from evoplan.planner.processes.world import World, check_world
from evoplan.planner.schedules.schedule import opaque_kernels
from evoplan.planner.sizes import exact_size

# Largest error of the loss (relative) and of any gradient (over the largest gradient entry).
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
TOLERANCES |= {"bf16-mixed": 5e-2, "fp16-mixed": 5e-2}
PEAK_TOLERANCE = 0.02  # of the predicted peak
PEAK_FLOOR = 4096  # bytes; models of a few kilobytes are mostly odds and ends


@dataclass(frozen=True)
class Verification:
    """What was promised and what was found, of one step. None: could not be had.

    Attributes:
        backend: what measured the peak: an allocator by its device, or the simulation.
        static_bytes: of both peaks: parameters, gradients, optimizer, inputs, outputs, workspace.
        unplanned_peak_bytes, unplanned_step_seconds: of the model without a plan.
        max_loss_error: relative.
        max_gradient_error: of any parameter or input, over the largest entry of any gradient.
        tolerances: what errors are held against; the peak's is a share of the predicted one.
        ok: whether all is within tolerance, and the peak within the budget.
        gradient_error_beyond_rounding: where half precision makes the plan's gradients differ from the plain
            model's by more than the tolerance: how much further from single precision's they are than those.
    """

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
    gradient_error_beyond_rounding: float | None
    tolerances: dict[str, float]
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


def simulate_plan(plan: Plan, rank: int = 0) -> Verification:
    """Run the applied plan, or one rank's share of it, on fake tensors: its memory, without using any.

    Args:
        plan: for any device; this machine need not have one.
        rank: whose share of a plan for several.

    Raises:
        ValueError: the plan runs kernels that cannot be traced, is for a loss of the user's own, or for
            another model than its configuration makes.
    """
    _check(plan, None)
    problem = plan.problem
    with torch.device("meta"):
        check_model(build_model(problem.config).to(getattr(torch, problem.dtype)), plan)
    opaque = opaque_kernels(plan.schedule)
    if opaque:
        raise ValueError(
            f"the plan runs {', '.join(opaque)}, which cannot be simulated; leave --simulate out"
        )
    where = device_of(problem)
    dtype = getattr(torch, problem.dtype)
    with simulated(where) as trace:
        model = fake_copy(planned_model(problem, rank), dtype).train(problem.training)
        before = trace.live_bytes
        planned = PlannedModule(model, plan.schedule, partial(FakeHost, trace), problem.donate)
        step = Trial(planned, problem, random_inputs(problem, input_shapes(problem, model)))
        step.casting = casting_of(where.kind, problem.autocast)
        if problem.donate:  # the step has copies, and these are nobody's
            before += sum(where.in_blocks(tensor.nbytes) for tensor in step.state.values())
        # What is there before the step: as live as in a real run, except the optimizer's states.
        trace.reset()
        step.run()
        peak = trace.peak_bytes - before
    static = sum(plan.static.values())
    live_before = sum(plan.static[name] for name in ("parameters", "optimizer", "workspace"))
    plan = _for_rank(plan, rank)
    return _judged(plan, "simulated", live_before + peak, static, None, None, None, None, None)


def _check(plan: Plan, loss: Loss | None) -> None:
    check_plan(plan)
    if plan.problem.loss != MEAN_SQUARE and loss is None:
        raise ValueError(
            f"the plan's peak is for the loss {plan.problem.loss}, which is not in the file; "
            "verify it from Python: verify_plan(stack, plan, loss=...)"
        )


def _for_rank(plan: Plan, rank: int) -> Plan:
    """The plan with one rank's own predicted peak."""
    if not plan.rank_peak_bytes:
        return plan
    predicted = plan.predicted.model_copy(update={"peak_bytes": plan.rank_peak_bytes[rank]})
    return plan.model_copy(update={"predicted": predicted})


def verify_plan(
    stack: Plannable | None,
    plan: Plan,
    repeats: int = 3,
    unplanned: bool = True,
    progress: Callable[[str], None] = lambda _: None,
    ranks: Ranks | None = None,
    loss: Loss | None = None,
) -> Verification:
    """Run the plan for real on this machine and compare it with the model without a plan.

    Args:
        stack: the model; a random one is made when None.
        plan: for this machine's kind of device.
        repeats: timed runs of each, interleaved; medians are reported.
        unplanned: also run the model without the plan, where it fits.
        progress: called with what is being done.
        ranks: that the plan's several ranks are; each gets what it has found itself.
        loss: that the plan was made with, if it was made with one.

    Raises:
        ValueError: the plan needs more memory than this machine has, or other ranks.
    """
    _check(plan, loss)
    problem = plan.problem
    if problem.ranks > 1 and ranks is None:
        raise ValueError(
            f"the plan is for {problem.ranks} ranks; use --simulate, or start it with "
            f"`torchrun --nproc_per_node={problem.ranks} -m evoplan.planner verify`"
        )
    kind = kind_here(problem)
    plan = plan if ranks is None else _for_rank(plan, ranks.rank)
    available = _room_for(plan, kind, ranks)
    if stack is None:
        progress("making the model")
        stack = random_stack(problem, kind)
    torch.manual_seed(1)  # ranks make the same inputs
    inputs = inputs_between_steps(problem, kind)
    planned = apply_plan(stack, plan, ranks)
    share = planned.stack if isinstance(planned.stack, ParallelEvoformer) else None
    step = Trial(planned, problem, inputs | (share.own(inputs) if share else {}), share, loss)
    progress("running the plan")
    step.run()
    live_before = step.live_bytes() + plan.static["optimizer"] + plan.static["workspace"]
    progress("measuring its memory")
    peak = live_before + measure.peak_bytes(step.run, kind)
    plain, plain_peak = None, None
    wrong: tuple[float | None, float | None, float | None] = None, None, None
    without = plan.baselines["none"].peak_bytes + problem.donate * sum(x.nbytes for x in inputs.values())
    if unplanned and without * problem.ranks <= available:
        progress("running without the plan")
        plain = Trial(stack, problem, {name: x.to(kind) for name, x in inputs.items()}, loss=loss)
        alone = share is None and 3 * without <= available
        wrong = _errors(plain, step, problem, alone, progress)
        progress("measuring its memory")
        beside = plain.live_bytes() + live_before - step.live_bytes()
        plain_peak = beside + measure.peak_bytes(plain.run, kind)
    planned_time, plain_time = _times(step, plain, repeats, kind, progress)
    about = f"{kind}-allocator", peak, sum(plan.static.values()), planned_time, plain_peak, plain_time
    return _judged(plan, *about, *wrong)


def _room_for(plan: Plan, kind: str, ranks: Ranks | None) -> int:
    """What this process may take; ValueError where the plan needs more."""
    available = available_bytes(kind)
    if ranks is not None:  # all decide alike; processes share a machine's memory, and have a GPU each
        sharing = ranks.size if kind == "cpu" else 1
        available = ranks.agree(available // sharing, torch.device(kind))
    if plan.predicted.peak_bytes > available:
        raise ValueError(
            f"the plan needs {exact_size(plan.predicted.peak_bytes)}, this machine has "
            f"{exact_size(available)} free; "
            "use --simulate, or --blocks to shorten the stack"
        )
    return available


def _errors(
    plain: Trial, planned: Trial, problem: Problem, alone: bool, progress: Callable[[str], None]
) -> tuple[float, float | None, float | None]:
    """Of the loss, of the gradients, and how far these are beyond rounding, where that is asked.

    Args:
        alone: there is one rank, and room for a third model.
    """
    loss_error, gradient_error = errors(plain, planned)
    off = gradient_error is not None and gradient_error > TOLERANCES[problem.precision]
    if not (off and alone and (problem.mixed or getattr(torch, problem.dtype).itemsize == 2)):
        return loss_error, gradient_error, None
    progress("comparing both with single precision")
    return loss_error, gradient_error, beyond_rounding(plain, planned, problem)


def _times(
    planned: Trial, plain: Trial | None, repeats: int, kind: str, progress: Callable[[str], None]
) -> tuple[float, float | None]:
    """Median seconds of both, interleaved: the machine's speed drifts."""
    times: dict[str, list[float]] = {"planned": [], "plain": []}
    for index in range(repeats):
        progress(f"timing {index + 1}/{repeats}")
        times["planned"].append(measure.seconds(planned.run, kind))
        if plain is not None:
            times["plain"].append(measure.seconds(plain.run, kind))
    return median(times["planned"]), median(times["plain"]) if plain is not None else None


def verify_on(
    world: World, plan: Plan, repeats: int, command: str, progress: Callable[[str], None] = lambda _: None
) -> list[Verification]:
    """Verify a plan on its ranks, of which this process is one; what each has found.

    Raises:
        CommonError: the world is not the plan's; `command` is what the message says to start.
    """
    check_world(plan.problem.ranks, world, command, agreed=plan.identity)
    kind = kind_here(plan.problem)
    world.connect(kind, replicas=1)
    assert world.group is not None
    return world.gathered_objects(verify_plan(None, plan, repeats, True, progress, Ranks(world.group)))


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
    excess: float | None = None,
) -> Verification:
    numerics = TOLERANCES[plan.problem.precision]
    budget, predicted = plan.problem.budget_bytes, plan.predicted.peak_bytes
    expected = predicted - plan.static.get("reserve", 0)  # which nothing here uses
    checks = [
        abs(peak - expected) <= max(PEAK_TOLERANCE * expected, PEAK_FLOOR),
        budget is None or peak <= budget,
        loss_error is None or loss_error <= numerics,
        gradient_error is None or gradient_error <= numerics or (excess is not None and excess <= numerics),
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
        gradient_error_beyond_rounding=excess,
        tolerances={"peak": PEAK_TOLERANCE, "loss": numerics, "gradient": numerics},
        ok=all(checks),
    )
