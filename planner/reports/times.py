"""Times in words: what was measured beside what the roofline says."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from evoplan.cost_model.calibrate import Calibration
from evoplan.cost_model.times_cache import Timing
from evoplan.planner.checking.profiling import Measurement
from evoplan.planner.problems.costing import kind_of
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.tables import describe_problem, new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size


def print_profile(measured: list[Measurement], calibration: Calibration, console: Console) -> None:
    """Each step's fastest strategies beside whole, the roofline as a multiple, and the fitted constants."""
    table = new_table(
        "measured times",
        "submodule",
        "strategy",
        "forward",
        "backward",
        "spread",
        "kept",
        "roofline",
    )
    shown: dict[str, list[tuple[Measurement, Timing]]] = {}
    for row in measured:
        if row.timing is not None:
            shown.setdefault(kind_of(row.step.name), []).append((row, row.timing))
    for name, rows in shown.items():
        rows.sort(key=lambda timed: _total(timed[1]))
        whole = [timed for timed in rows if str(timed[0].strategy) == "whole"]
        for row, timing in dict.fromkeys([*rows[:4], *whole]):
            predicted = None
            if (cost := row.cost) is not None:
                predicted = cost.forward_seconds + cost.backward_seconds or cost.discard_seconds
            table.add_row(
                name,
                str(row.strategy),
                format_seconds(timing.forward or timing.discard),
                format_seconds(timing.backward),
                f"{timing.spread:.0%}",
                "-" if row.preserved_bytes is None else format_size(row.preserved_bytes),
                "-" if predicted is None else f"{predicted / _total(timing):.2f} x",
            )
            name = ""
    print_table(table, console, keys=2)
    left_out: dict[tuple[str, str], set[str]] = {}
    for row in measured:
        if row.reason:
            left_out.setdefault((row.strategy.kernel, row.reason), set()).add(kind_of(row.step.name))
    for (kernel, reason), names in left_out.items():
        console.print(f"not measured: {kernel} for {', '.join(sorted(names))}: {reason}", highlight=False)
    console.print(
        f"calibrated: {calibration.flops / 1e9:.1f} GFLOP/s, {calibration.bandwidth / 1e9:.1f} GB/s, "
        f"{calibration.launch_seconds * 1e6:.1f} us a kernel; half of {calibration.rows} measured times lie "
        f"within {calibration.error:.0%} of it",
        highlight=False,
    )


def _total(timing: Timing) -> float:
    return timing.forward + timing.backward or timing.discard


def profile_to_json(
    problem: Problem, measured: list[Measurement], calibration: Calibration
) -> dict[str, Any]:
    """All of it as plain types."""
    return {
        "problem": problem.model_dump(mode="json"),
        "description": describe_problem(problem),
        "calibration": calibration.to_json(),
        "times": [
            {
                "step": kind_of(row.step.name),
                "strategy": str(row.strategy),
                **({"reason": row.reason} if row.timing is None else row.timing._asdict()),
                "preserved_bytes": row.preserved_bytes,
                "roofline": row.cost
                and {
                    "discard": row.cost.discard_seconds,
                    "forward": row.cost.forward_seconds,
                    "backward": row.cost.backward_seconds,
                },
            }
            for row in measured
        ],
    }
