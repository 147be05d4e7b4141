"""Steps one by one: what the allocator counts against the trace, and which kernels run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.profile import bytes_taken, time_step, with_data
from evoplan.cost_model.steps import LOSS_NUMBERS, NUMBER_BYTES, StepCost
from evoplan.experiments.gpu.setting import PRECISIONS, Row, Runs, Setting, costed, free_up, named
from evoplan.experiments.strategies import last_choices
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.context import autocast
from evoplan.model.running.fused import KernelError
from evoplan.model.running.kernels import KERNELS
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import EAGER, Strategy
from evoplan.planner.checking.trial import Trial, random_inputs, random_stack
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import kind_of, planned_model
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.sizes import format_seconds, format_size

MOST = 10  # kernels that a row lists
PHASES = ("discard", "forward", "preserved", "backward")


@dataclass(frozen=True)
class _Given:
    """What the steps of a model run on."""

    problem: Problem
    state: dict[str, Tensor]
    constants: dict[str, Tensor]

    @property
    def casting(self) -> Casting:
        return partial(autocast, self.problem.device, self.problem.autocast, keep_casts=False)

    def step(self, step: Step) -> Step:
        """The step with weights."""
        return with_data(step, getattr(torch, self.problem.dtype), self.problem.device)


def _given(problem: Problem) -> _Given:
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), problem.device)
    with torch.no_grad():
        state, constants = costed(problem).model.prepare(**inputs)
    return _Given(problem, dict(state), dict(constants))


def _steps(problem: Problem) -> tuple[Step, ...]:
    """The steps of a block, without data."""
    return Chain.of(planned_model(problem).train(problem.training)).steps


# --- what they take ---------------------------------------------------------------------------


def byte_runs(setting: Setting) -> Runs:
    """Every step of a block in both precisions."""
    size = setting.sizes.profiled
    problems = {precision: setting.problem(size, precision) for precision in PRECISIONS}
    return {
        f"{precision} {kind_of(step.name)} {named(size)}": partial(
            taken, problem, step.index, setting.sizes.pieces
        )
        for precision, problem in problems.items()
        for step in _steps(problem)
    }


def taken(problem: Problem, index: int, pieces: int) -> Row:
    """Bytes of one step under strategies of up to so many pieces, traced and measured, phase by phase."""
    free_up()
    step = _steps(problem)[index]
    given, table = _given(problem), costed(problem).table
    numbers = LOSS_NUMBERS * costed(problem).device.in_blocks(NUMBER_BYTES)  # in every traced peak
    live = table.gradient_bytes(index + 1) + numbers
    here = given.step(step)
    rows = []
    for cost in _few(table.options[index], pieces):
        found = bytes_taken(here, cost.strategy, given.state, given.constants, given.casting)
        backward = found.preserved + live + found.vjp
        measured = found.discard + numbers, found.forward + numbers, found.preserved, backward
        for phase, size in zip(PHASES, measured, strict=True):
            traced = getattr(cost, f"{phase}_bytes")
            rows.append(
                {
                    "strategy": str(cost.strategy), "phase": phase, "traced_bytes": traced,
                    "measured_bytes": size, "residue_bytes": size - traced,
                    "residue": (size - traced) / traced if traced else None,
                }
            )  # fmt: skip
    return {"step": kind_of(step.name), "precision": problem.precision, "phases": rows}


def _few(options: tuple[StepCost, ...], most: int) -> list[StepCost]:
    """Strategies of each kind and kernel in the fewest pieces, and in the most up to a number."""
    groups: dict[tuple[Any, ...], list[StepCost]] = {}
    for cost in (cost for cost in options if cost.strategy.n <= most):
        groups.setdefault((cost.strategy.kind, cost.strategy.kernel), []).append(cost)
    return [
        cost for group in groups.values() for cost in (group if len(group) < 2 else (group[0], group[-1]))
    ]


def bytes_in_words(row: Row) -> str:
    """A line for people: the phase that is furthest off."""
    worst = max(row["phases"], key=lambda phase: abs(phase["residue_bytes"]))
    return (
        f"largest residue {format_size(worst['residue_bytes'])} of {format_size(worst['traced_bytes'])} "
        f"({worst['phase']} under {worst['strategy']})"
    )


# --- which kernels run ------------------------------------------------------------------------


def kernel_runs(setting: Setting) -> Runs:
    """Attention under every kernel that is here, step by step; then a whole step under a plan."""
    size, found = setting.sizes.profiled, Runs()
    for precision in PRECISIONS:
        problem = setting.problem(size, precision)
        for step in _steps(problem):
            if step.submodule.attends:
                for name in (EAGER, *_here(setting.device)):
                    run = partial(attention, problem, step.index, name, setting.sizes.repeats)
                    found[f"{precision} {kind_of(step.name)} {named(size)} {name}"] = run
        found[f"{precision} plan"] = partial(whole_step, setting, precision)
    return found


def _here(device: str) -> list[str]:
    return [name for name, kernel in KERNELS.items() if device in kernel.devices and not kernel.missing]


def attention(problem: Problem, index: int, kernel: str, repeats: int) -> Row:
    """Times, bytes and device kernels of a step whose attention runs with a kernel."""
    free_up()
    step = _steps(problem)[index]
    given, strategy = _given(problem), Strategy(WHOLE.kind, kernel=kernel)
    here = given.step(step)
    try:
        timing = time_step(here, [strategy], given.state, given.constants, repeats, casting=given.casting)[
            strategy
        ]
        bytes_ = bytes_taken(here, strategy, given.state, given.constants, given.casting)
    except (RuntimeError, KernelError) as error:  # what a library says when it cannot
        return {"cannot": str(error).strip().partition("\n")[0]}
    once = partial(time_step, here, [strategy], given.state, given.constants, 1, casting=given.casting)
    return {
        "seconds": {"discard": timing.discard, "forward": timing.forward, "backward": timing.backward},
        "bytes": bytes_._asdict(),
        **profiled(once, problem.device),
    }


def whole_step(setting: Setting, precision: str) -> Row:
    """Device kernels of one training step under the fastest plan, and which kernels the plan has chosen."""
    free_up()
    problem = setting.problem(setting.sizes.capped, precision)
    plan = solve(cost_with_times(problem, "auto", setting.cache))
    stack = random_stack(problem, problem.device)
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), problem.device)
    trial = Trial(apply_plan(stack, plan), problem, inputs)
    trial.run()
    chosen = Counter(strategy.kernel for strategy in last_choices(plan.schedule))
    return {"times": plan.costs["time"], "chosen": dict(chosen), **profiled(trial.run, problem.device)}


def profiled(run: Any, device: str) -> Row:
    """The kernels that take most of a run, and the attention operators in it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    own = [
        (getattr(event, clock) / 1e6, event) for event in events if event.device_type.name.lower() == device
    ]
    own.sort(key=lambda pair: -pair[0])
    return {
        "attention": sorted({event.key for event in events if "_attention" in event.key}),
        "total_seconds": sum(seconds for seconds, _ in own),
        "kernels": [
            {"name": event.key[:160], "calls": event.count, "seconds": seconds}
            for seconds, event in own[:MOST]
        ],
    }


def kernels_in_words(row: Row) -> str:
    """A line for people."""
    if "cannot" in row:
        return f"cannot: {row['cannot']}"
    first = row["kernels"][0]["name"][:60] if row["kernels"] else "none"
    if "chosen" in row:
        chosen = ", ".join(f"{count} x {name}" for name, count in row["chosen"].items())
        return f"kernels chosen by {row['times']} times: {chosen}; most time in {first}"
    picked = f"; picks {', '.join(row['attention'])}" if row["attention"] else ""
    return f"{format_seconds(sum(row['seconds'].values()))}, most in {first}{picked}"
