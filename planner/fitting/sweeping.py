"""The frontier of a model that was written elsewhere, in the form that sweeps of our own models have."""

from __future__ import annotations

from typing import Any

from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.fitting.solving import baselines, sampled_frontier


def swept(fitting: Fitting, points: int) -> dict[str, Any]:
    """`points` of {budget_bytes, peak_bytes, step_seconds}, each faster than those that need less; baselines.

    Args:
        points: at most so many; peaks are of the whole step, so that each is its own budget.
    """
    found = [fit.predicted for fit in sampled_frontier(fitting, points)]
    about = f"{len(fitting.captured.calls)} blocks, {fitting.precision}, {fitting.device.name}"
    return {
        "title": f"{type(fitting.model).__name__}, {about}",
        "costs": {"memory": "traced", "time": fitting.times},
        "static_bytes": sum(fitting.static.values()),
        "points": [
            {"budget_bytes": p.peak_bytes, "peak_bytes": p.peak_bytes, "step_seconds": p.step_seconds}
            for p in found
        ],
        "baselines": {name: baseline.model_dump() for name, baseline in baselines(fitting).items()},
    }
