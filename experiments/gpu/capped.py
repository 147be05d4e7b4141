"""Life under a hard cap: the allocator refuses more than the predicted peak and a little, and the step runs.

Without a plan the model must die there, or the cap shows nothing.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from evoplan.experiments.gpu.setting import PRECISIONS, Row, Runs, Setting, free_up, named, plan_at
from evoplan.planner.checking.trial import Trial, random_inputs, random_stack
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.problems.problem import Problem
from evoplan.planner.sizes import format_size

# Caps over predicted peaks. The first is what is asked of a plan; the others say what it took where it died.
CAPS = (1.03, 1.06, 1.1, 1.2, 1.4)
STEPS = 3


def runs(setting: Setting) -> Runs:
    """Plans of both precisions at several budgets."""
    size = setting.sizes.capped
    return {
        f"{precision} {named(size)} at {share:.0%}": partial(capped, setting.problem(size, precision), share)
        for precision in PRECISIONS
        for share in setting.sizes.capped_shares
    }


def capped(problem: Problem, share: float) -> Row:
    """Some steps under a plan and a cap, then the plain model under the first cap."""
    plan = plan_at(problem, share)
    predicted = plan.predicted.peak_bytes
    stack = random_stack(problem, problem.device)
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), problem.device)
    planned, plain = Trial(apply_plan(stack, plan), problem, inputs), Trial(stack, problem, inputs)
    row: Row = {"predicted_peak_bytes": predicted, "cap_over_predicted": None}
    for cap in CAPS:
        died = _died(planned, math.ceil(predicted * cap))
        row.setdefault("at_first_cap", died or "lives")
        if died is None:
            row |= {"cap_over_predicted": cap, "cap_bytes": math.ceil(predicted * cap)} | _counted()
            break
    row["plain_peak_bytes"] = plan.baselines["none"].peak_bytes
    row["plain"] = _died(plain, math.ceil(predicted * CAPS[0])) or "lives"
    return row


def _died(trial: Trial, cap: int) -> str | None:
    """What the allocator said when it refused; None: all steps ran."""
    free_up()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, cap / torch.cuda.get_device_properties(0).total_memory)
    )
    try:
        for _ in range(STEPS):
            trial.run()
        torch.cuda.synchronize()
        return None
    except torch.OutOfMemoryError as error:
        return str(error).partition(". ")[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _counted() -> Row:
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def in_words(row: Row) -> str:
    """A line for people."""
    predicted, cap = format_size(row["predicted_peak_bytes"]), row["cap_over_predicted"]
    lives = "dies under every cap" if cap is None else f"lives under {cap:.2f} of it"
    plain = "LIVES" if row["plain"] == "lives" else "dies"
    return f"predicted {predicted}: {lives}, the plain model {plain} under {CAPS[0]:.2f}"
