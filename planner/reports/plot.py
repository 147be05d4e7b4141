"""The frontier as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.figure import Figure

from evoplan.planner.files import picture_format, write_atomically

__all__ = ["plot_sweep", "plt", "save_figure"]

GIB = 2**30


def plot_sweep(document: dict[str, Any], path: str | Path, plan: dict[str, Any] | None = None) -> None:
    """Draw step time against peak memory, baselines marked.

    Args:
        document: as `planner.plans.planning.sweep` returns it.
        path: its suffix names the format (png, svg, pdf).
        plan: a prediction {peak_bytes, step_seconds} to mark as the plan.

    Raises:
        ValueError: a suffix that is no picture format.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    points = document["points"]
    unit, name = (GIB, "GiB") if points[-1]["peak_bytes"] > 4 * GIB else (2**20, "MiB")
    axes.step(
        [p["peak_bytes"] / unit for p in points],
        [p["step_seconds"] for p in points],
        where="post", color="tab:blue", label="planned",
    )  # fmt: skip
    if flat := document.get("seed_dp_points"):
        axes.step(
            [p["peak_bytes"] / unit for p in flat],
            [p["step_seconds"] for p in flat],
            where="post", color="tab:orange", linestyle=":", label="seed-dp",
        )  # fmt: skip
    middle = (points[0]["peak_bytes"] * points[-1]["peak_bytes"]) ** 0.5  # of a logarithmic scale
    for (label, baseline), marker in zip(document["baselines"].items(), "osD^v<>", strict=False):
        axes.plot(
            baseline["peak_bytes"] / unit, baseline["step_seconds"],
            marker, color="tab:orange", markersize=7, linestyle="none",
        )  # fmt: skip
        left = baseline["peak_bytes"] > middle  # where the frame is near on the right
        axes.annotate(
            label, (baseline["peak_bytes"] / unit, baseline["step_seconds"]),
            textcoords="offset points", xytext=(-6 if left else 6, 5), ha="right" if left else "left",
        )  # fmt: skip
    if plan is not None:
        axes.plot(
            plan["peak_bytes"] / unit,
            plan["step_seconds"],
            "*",
            color="tab:green",
            markersize=14,
            label="this plan",
        )
    axes.set_title(document["title"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel(f"peak memory [{name}]")
    axes.set_ylabel(f"step time [s, {document['costs']['time']}]")
    # The last bytes cost the most: what is far slower than any baseline is left out of the picture.
    slowest = max(p["step_seconds"] for p in document["baselines"].values())
    axes.set_ylim(0, min(1.05 * points[0]["step_seconds"], 2.5 * slowest))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture, all of it or nothing, and close it; ValueError where the suffix is no format."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=picture_format(path), dpi=150)
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())
