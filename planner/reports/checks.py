"""Predicted beside measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from evoplan.planner.plans.plan import Plan
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import exact_size, format_seconds, format_size

if TYPE_CHECKING:
    from evoplan.planner.checking.verify import Verification

UNTIMED = "not measured: the one step was for its memory, which slows it; for a time give more --steps"


def print_verification(found: Verification, console: Console, ranks: int = 1) -> None:
    """Predicted beside measured.

    Args:
        ranks: that share the model; without a plan it is run whole on each.
    """
    plain = "whole, without plan" if ranks > 1 else "without plan"
    table = new_table(f"verification ({found.backend})", "", "predicted", "measured", plain)

    def size(value: int | None) -> str:
        return "-" if value is None else format_size(value)

    def time(value: float | None) -> str:
        return "-" if value is None else format_seconds(value)

    table.add_row(
        "peak",
        size(found.predicted_peak_bytes),
        size(found.measured_peak_bytes),
        size(found.unplanned_peak_bytes),
    )
    static = found.static_bytes
    table.add_row(
        "activations",
        size(found.predicted_peak_bytes - static),
        size(found.measured_peak_bytes - static),
        size(None if found.unplanned_peak_bytes is None else found.unplanned_peak_bytes - static),
    )
    table.add_row(
        "step time",
        time(found.predicted_step_seconds),
        time(found.measured_step_seconds),
        time(found.unplanned_step_seconds),
    )
    print_table(table, console)
    if ranks > 1 and found.unplanned_peak_bytes is not None:
        console.print(
            f"one rank of {ranks}, which has its share of the model; compared with the whole model, run "
            "without a plan on one process: its memory, its time, its loss and gradients",
            highlight=False,
        )
    for name, error in (("loss", found.max_loss_error), ("gradient", found.max_gradient_error)):
        if error is not None:
            console.print(
                f"largest {name} error {error:.2g} (tolerance {found.tolerances[name]:.0e})", highlight=False
            )
    if found.gradient_error_beyond_rounding is not None:
        console.print(
            "against single precision the plan's gradients are off by at most "
            f"{found.gradient_error_beyond_rounding:.2g} more than the plain model's",
            highlight=False,
        )
    console.print("ok" if found.ok else "FAILED", style="green" if found.ok else "red")


def print_rank_verifications(results: list[Verification], console: Console) -> None:
    """Of several ranks, what each has found."""
    if len(results) == 1:
        return
    table = new_table(
        "ranks", "rank", "predicted peak", "measured", "measured / predicted", "gradient error", ""
    )
    for rank, found in enumerate(results):
        error = found.max_gradient_error
        table.add_row(
            str(rank),
            format_size(found.predicted_peak_bytes),
            format_size(found.measured_peak_bytes),
            f"{found.measured_peak_bytes / found.predicted_peak_bytes:.4f}",
            "-" if error is None else f"{error:.2g}",
            "ok" if found.ok else "FAILED",
        )
    print_table(table, console)


def print_ranks(ranks: list[dict[str, Any]], plan: Plan, kind: str, console: Console) -> None:
    """Predicted beside measured of each rank that ran a plan."""
    seconds = f"{format_seconds(plan.predicted.step_seconds)} ({plan.costs['time']})"
    budget = plan.problem.budget_bytes
    if len(ranks) == 1:
        (row,) = ranks
        console.print(
            f"peak: predicted {format_size(row['predicted_peak_bytes'])}, measured "
            f"{format_size(row['measured_peak_bytes'])} ({kind}-allocator)"
            + (f", budget {exact_size(budget)}" if budget else ""),
            highlight=False,
        )
        measured = row["step_seconds"]
        said = UNTIMED if measured is None else f"measured {format_seconds(measured)}"
        console.print(f"step time: predicted {seconds}, {said}", highlight=False)
        return
    console.print(f"step time: predicted {seconds}; peaks by the {kind} allocator", highlight=False)
    table = new_table("each rank", "rank", "peak predicted", "measured", "measured / predicted", "step time")
    untimed = any(row["step_seconds"] is None for row in ranks)
    for row in ranks:
        predicted, measured = row["predicted_peak_bytes"], row["measured_peak_bytes"]
        table.add_row(
            str(row["rank"]),
            format_size(predicted),
            format_size(measured),
            f"{measured / predicted:.4f}",
            "-" if row["step_seconds"] is None else format_seconds(row["step_seconds"]),
        )
    print_table(table, console)
    if untimed:
        console.print(f"step time {UNTIMED}", highlight=False)
