"""The frontier of a model that was written elsewhere, in the form that sweeps of our own models have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.fitting.solving import baselines, sampled_frontier
from evoplan.planner.pages.sweep import Planned, sweep_page


def swept(
    fitting: Fitting, points: int, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], list[Planned]]:
    """`points` of {budget_bytes, peak_bytes, step_seconds}, each faster than those that need less; baselines.

    Args:
        points: at most so many; peaks are of the whole step, so that each is its own budget.
        progress: told of each that is through.

    Returns:
        The document, and each point with its schedule.
    """
    fits = sampled_frontier(fitting, points, progress)
    found = [fit.predicted for fit in fits]
    about = f"{len(fitting.captured.calls)} blocks, {fitting.precision}, {fitting.device.name}"
    document = {
        "title": f"{type(fitting.model).__name__}, {about}",
        "costs": {"memory": "traced", "time": fitting.times},
        "static_bytes": sum(fitting.static.values()),
        "points": [
            {"budget_bytes": p.peak_bytes, "peak_bytes": p.peak_bytes, "step_seconds": p.step_seconds}
            for p in found
        ],
        "baselines": {name: baseline.model_dump() for name, baseline in baselines(fitting).items()},
    }
    return document, [Planned(fit.predicted.peak_bytes, fit.predicted, fit.schedule) for fit in fits]


def sweep_of_fit(fitting: Fitting, document: dict[str, Any], plans: list[Planned]) -> str:
    """The page about such a sweep."""
    return sweep_page(document, document["points"], plans, [call.name for call in fitting.captured.calls])
