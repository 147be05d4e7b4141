"""The frontier as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.figure import Figure

from evoplan.planner.files import picture_format, write_atomically
from evoplan.planner.reports.labels import Label, place_labels

__all__ = ["BY_HAND", "PLANNED", "draw_sweep", "plot_sweep", "plt", "save_figure"]

GIB = 2**30
PLANNED, BY_HAND = "tab:blue", "tab:orange"


def plot_sweep(
    document: dict[str, Any],
    path: str | Path,
    plan: dict[str, Any] | None = None,
    steps: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Draw it and save it; see `draw_sweep`.

    Args:
        path: its suffix names the format (png, svg, pdf).

    Raises:
        ValueError: a suffix that is no picture format.
    """
    save_figure(draw_sweep(document, plan, steps), path)


def draw_sweep(
    document: dict[str, Any],
    plan: dict[str, Any] | None = None,
    steps: Sequence[dict[str, Any]] | None = None,
) -> Figure:
    """Step time against memory, baselines marked. A step of the frontier begins at the least budget for it.

    Args:
        document: as `planner.plans.sweeping.sweep` returns it.
        plan: a prediction {peak_bytes, step_seconds} to mark as the plan.
        steps: of the exact frontier, where the document's points are samples of it.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    points = document["points"] if steps is None else steps
    unit, name = (GIB, "GiB") if points[-1]["budget_bytes"] > 4 * GIB else (2**20, "MiB")
    axes.step(
        [p["budget_bytes"] / unit for p in points],
        [p["step_seconds"] for p in points],
        where="post", color=PLANNED, label="planned",
    )  # fmt: skip
    if flat := document.get("seed_dp_points"):
        axes.step(
            [p["peak_bytes"] / unit for p in flat],
            [p["step_seconds"] for p in flat],
            where="post", color=BY_HAND, linestyle=":", label="seed-dp",
        )  # fmt: skip
    labels = []
    for (label, baseline), marker in zip(document["baselines"].items(), "osD^v<>", strict=False):
        at = baseline["peak_bytes"] / unit, baseline["step_seconds"]
        axes.plot(*at, marker, color=BY_HAND, markersize=7, linestyle="none")
        labels.append(Label(label, *at))
    if plan is not None:
        at = plan["peak_bytes"] / unit, plan["step_seconds"]
        axes.plot(*at, "*", color="tab:green", markersize=14, label="this plan")
    axes.set_title(document["title"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel(f"memory [{name}]")
    axes.set_ylabel(f"step time [s, {document['costs']['time']}]")
    # The last bytes cost the most: what is far slower than any baseline is left out of the picture.
    slowest = max(p["step_seconds"] for p in document["baselines"].values())
    axes.set_ylim(0, min(1.05 * points[0]["step_seconds"], 2.5 * slowest))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    place_labels(axes, labels, size=10)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture, all of it or nothing, and close it; ValueError where the suffix is no format."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=picture_format(path), dpi=150)
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())
