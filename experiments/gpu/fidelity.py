"""Memory of plans: what the allocator handed out and what it reserved, against what was predicted."""

from __future__ import annotations

from functools import partial

import torch

from evoplan.experiments.gpu.setting import Row, Runs, Setting, free_up, named, plan_at
from evoplan.planner.checking.verify import verify_plan
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.sizes import format_size


def runs(setting: Setting, precision: str, numerics: bool) -> Runs:
    """Plans at several budgets.

    Args:
        numerics: also hold the first of each size against the plain model.
    """
    sizes = setting.sizes
    cases = [(setting.problem(size, precision), size, sizes.shares) for size in sizes.training]
    cases += [
        (setting.problem(size, precision, "inference"), size, sizes.inference_shares)
        for size in sizes.inference
    ]
    return {
        f"{problem.mode} {named(size)} at {share:.0%}": partial(
            measured, problem, share, numerics and share == shares[0]
        )
        for problem, size, shares in cases
        for share in shares
    }


def measured(problem: Problem, share: float, numerics: bool) -> Row:
    """One plan. Ratios are measured over predicted: of activations, and of what the whole process holds."""
    plan = plan_at(problem, share)
    found = verify_plan(None, plan, repeats=1, unplanned=False)
    predicted, static = plan.predicted.peak_bytes, plan.predicted.static_bytes
    activations = found.measured_peak_bytes - static
    row: Row = {
        "budget_bytes": plan.problem.budget_bytes,
        "depth": depth(plan.schedule),
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": found.measured_peak_bytes,
        "static_bytes": static,
        "ratio": activations / (predicted - static) if predicted > static else None,
        "step_seconds": found.measured_step_seconds,
        "predicted_step_seconds": found.predicted_step_seconds,
        "ok": found.ok,
        **_whole_process(problem.device, predicted),
    }
    if numerics:
        free_up()
        beside = verify_plan(None, plan, repeats=1)
        row |= {name: getattr(beside, name) for name in ("max_loss_error", "max_gradient_error")}
        row["within_tolerance"] = beside.ok
    return row


def _whole_process(device: str, predicted: int) -> Row:
    """The most that the process has had from the allocator, and the allocator from the device."""
    if device != "cuda":
        return {"allocated_bytes": None, "reserved_bytes": None, "reserved": "only CUDA's allocator reserves"}
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "allocated_over_predicted": allocated / predicted,
        "reserved_over_predicted": reserved / predicted,
        "expandable_segments": settings.get("expandable_segments"),
    }


def in_words(row: Row) -> str:
    """A line for people."""
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.4f}"
    said = f"predicted {format_size(row['predicted_peak_bytes'])}, measured / predicted {ratio}"
    if row["reserved_bytes"] is not None:
        said += (
            f", of the process {row['allocated_over_predicted']:.4f}, reserved "
            f"{row['reserved_over_predicted']:.4f}"
        )
    return said + ("" if row.get("within_tolerance", True) and row["ok"] else ", NOT WITHIN TOLERANCE")
