"""The roofline as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evoplan.planner.reports.plot import plt, save_figure


def plot_roofline(data: Mapping[str, Any], path: str | Path) -> None:
    """The device's roof, each component at its intensity on it, and where the step really is.

    Args:
        data: what roofline_data.json holds.
    """
    device, point = data["device_info"], data["performance_point"]
    peak, bandwidth = device["peak_flops"], device["peak_memory_bandwidth"]
    components = data["components"]
    intensities = {
        name: found["flops"] / found["bytes"] for name, found in components.items() if found["flops"]
    }
    ends = [*intensities.values(), point["arithmetic_intensity"], peak / bandwidth]
    x = np.geomspace(min(ends) / 4, max(ends) * 4, 200)
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.loglog(x, np.minimum(peak, bandwidth * x), color="black", label=f"roof of {device['name']}")
    for name, intensity in intensities.items():
        reachable = components[name]["flops"] / components[name]["predicted_seconds"]
        axes.plot(intensity, reachable, "o", label=name.replace("_", " "))
    axes.plot(
        point["arithmetic_intensity"], point["achieved_performance"], "k*", markersize=14,
        label=f"the step, measured ({point['mfu_percent']:.0f} % of the peak)",
    )  # fmt: skip
    axes.set_xlabel("FLOP per byte moved")
    axes.set_ylabel("FLOP/s")
    axes.set_title("TinyOpenFold, one training step; components as the roofline predicts them")
    axes.legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)
