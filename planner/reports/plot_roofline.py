"""The roofline as a picture: a device's roof, and what runs under it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from evoplan.cost_model.devices import Device
from evoplan.cost_model.roofline import Bounds, balance
from evoplan.planner.plans.roofline import Row
from evoplan.planner.reports.labels import Label, place_labels
from evoplan.planner.reports.plot import plt, save_figure
from evoplan.planner.sizes import format_rate

PHASES = {"forward": "tab:blue", "backward": "tab:orange", "discard": "tab:blue"}


class Point(NamedTuple):
    """Something with arithmetic; the colour is its phase's."""

    name: str
    bounds: Bounds
    phase: str = "forward"


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Those rows that compute something; names as short as the rows allow."""
    strategies = any(str(row.strategy) != "whole" for row in rows)
    return [
        Point(f"{row.label} {row.strategy}" if strategies else row.label, row.bounds, row.phase)
        for row in rows
        if row.bounds.flops
    ]


def plot_roofline(points: Sequence[Point], device: Device, dtype: str, title: str, path: str | Path) -> None:
    """Draw and save it; see `draw_roofline`.

    Raises:
        ValueError: a suffix that is no picture format.
    """
    save_figure(draw_roofline(points, device, dtype, title), path)


def draw_roofline(points: Sequence[Point], device: Device, dtype: str, title: str) -> Figure:
    """The roof, each point on it at its intensity, and below it the rate that the roofline predicts.

    On the roof all of a point's kernels overlap; predicted, each takes as long as its own bottleneck and its
    launch. One name stands for all points of it.
    """
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    edge, peak = balance(device, dtype), device.peak_flops[dtype]
    ends = [*(point.bounds.intensity for point in points), edge]
    x = np.geomspace(min(ends) / 4, max(ends) * 4, 200)
    x = np.sort(np.append(x, edge))
    axes.loglog(x, np.minimum(peak, device.bandwidth * x), color="black", linewidth=1.2)
    for phase in dict.fromkeys(point.phase for point in points):
        own = [point.bounds for point in points if point.phase == phase]
        at, color = [found.intensity for found in own], PHASES[phase]
        reached = [found.flops / found.predicted_seconds for found in own]
        roof = [min(peak, device.bandwidth * intensity) for intensity in at]
        axes.vlines(at, reached, roof, color=color, alpha=0.4, linewidth=0.8)
        axes.plot(at, roof, "o", color=color, markersize=5, label=f"{phase}, on the roof")
        axes.plot(at, reached, "x", color=color, markersize=4, label=f"{phase}, predicted")
    axes.axvline(edge, color="0.7", linestyle=":", linewidth=1, zorder=0)
    axes.set_xlabel("FLOP per byte moved")
    axes.set_ylabel("FLOP/s")
    axes.set_title(
        f"{title}\n{device.name}: {format_rate(peak)} in {dtype}, {format_rate(device.bandwidth, 'B/s')}, "
        f"bound by arithmetic from {edge:.3g} FLOP/B on", fontsize=9,
    )  # fmt: skip
    axes.margins(y=0.15)
    axes.legend(fontsize=8, loc="lower right")
    named = {point.name: point for point in points[::-1]}  # the first of each name
    labels = [
        Label(name, point.bounds.intensity, min(peak, device.bandwidth * point.bounds.intensity))
        for name, point in named.items()
    ]
    place_labels(axes, sorted(labels, key=lambda label: label.x), size=7.5)
    return figure
