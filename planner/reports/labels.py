"""Labels of points in a picture: inside its frame, and none on another, on a marker or on the legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

RADII = (9, 14, 20, 28, 38, 50, 64, 80, 100, 125, 155, 190, 230)  # points from the marker
DIRECTIONS = 24
FAR = 20  # points from which on a line leads from the label to its marker
MARGIN = 1.5  # pixels around a label


class Label(NamedTuple):
    """A text and the point that it is about, in the units of the axes."""

    text: str
    x: float
    y: float


def place_labels(axes: Axes, labels: Iterable[Label], size: float = 8) -> list[Annotation]:
    """Write each label near its point. What else the picture has must be drawn already.

    Of the places around a point the nearest counts that lies inside the frame and hits no other label, no
    marker and no legend; between equally near ones that which hides the least of the lines.

    Args:
        size: of the letters, in points.

    Returns:
        What was written; a label that has no place is left out.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # from here on nothing moves
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    taken = [*_markers(axes, scale), *_legends(axes)]
    lines = _along(axes)
    written = []
    for label in labels:
        at = axes.transData.transform((label.x, label.y))
        note = axes.annotate(label.text, (label.x, label.y), fontsize=size, ha="center", va="center",
                             textcoords="offset points", xytext=(0, 0))  # fmt: skip
        box = note.get_window_extent()
        place = _place(at, box, frame, taken, lines, scale)
        if place is None:
            note.remove()
            continue
        (dx, dy), bounds = place
        note.set_position((dx / scale, dy / scale))
        taken.append(bounds)
        written.append(note)
        _lead(axes, at, bounds, FAR * scale)
    return written


def _place(
    at: np.ndarray,
    box: Bbox,
    frame: Bbox,
    taken: Sequence[Bbox],
    lines: np.ndarray,
    scale: float,
) -> tuple[tuple[float, float], Bbox] | None:
    """Offset of a label's centre in pixels, and the box that it fills there; None: there is no room."""
    for radius in RADII:
        found = []
        for number in range(DIRECTIONS):
            angle = 2 * math.pi * number / DIRECTIONS
            # From the marker's edge to the label's: the centre is further by half of the label.
            dx = math.cos(angle) * (radius * scale + box.width / 2)
            dy = math.sin(angle) * (radius * scale * 0.6 + box.height / 2)
            x, y = at[0] + dx, at[1] + dy
            bounds = Bbox.from_bounds(x - box.width / 2, y - box.height / 2, box.width, box.height)
            bounds = bounds.padded(MARGIN)
            inside = (
                frame.x0 <= bounds.x0
                and bounds.x1 <= frame.x1
                and (frame.y0 <= bounds.y0 and bounds.y1 <= frame.y1)
            )
            if inside and not any(bounds.overlaps(other) for other in taken):
                hidden = _inside(lines, bounds)
                found.append((hidden, number, (dx, dy), bounds))
        if found and (found[0][0] == 0 or min(found)[0] == 0 or radius >= RADII[4]):
            _, _, offset, bounds = min(found, key=lambda place: place[:2])
            return offset, bounds
    return None


def _inside(points: np.ndarray, box: Bbox) -> int:
    x, y = points.T
    return int(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).sum())


def _markers(axes: Axes, scale: float) -> list[Bbox]:
    """Boxes around the markers of a picture, in pixels."""
    found = []
    for line in axes.lines:
        if line.get_marker() in ("None", "", " ", None):
            continue
        half = max(float(line.get_markersize()) * scale / 2 - 1, 1.0)
        for x, y in _pixels(axes, line):
            found.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    return found


def _legends(axes: Axes) -> list[Bbox]:
    legend = axes.get_legend()
    return [] if legend is None else [legend.get_window_extent()]


def _along(axes: Axes) -> np.ndarray:
    """Pixels along the lines of a picture, a few apart: (n, 2)."""
    found = [np.empty((0, 2))]
    for line in axes.lines:
        if line.get_linestyle() in ("None", "", " "):
            continue
        corners = np.asarray(line.get_transform().transform(np.asarray(line.get_path().vertices)))
        corners = corners[np.isfinite(corners).all(axis=1)]
        for (x0, y0), (x1, y1) in pairwise(corners):
            count = min(400, 2 + int(max(abs(x1 - x0), abs(y1 - y0)) / 3))
            found.append(np.linspace((x0, y0), (x1, y1), count))
    return np.concatenate(found)


def _pixels(axes: Axes, line: Line2D) -> np.ndarray:
    data = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
    pixels = np.asarray(axes.transData.transform(data))
    seen: np.ndarray = pixels[np.isfinite(pixels).all(axis=1)]
    return seen


def _lead(axes: Axes, at: np.ndarray, box: Bbox, near: float) -> None:
    """A thin line from a marker to the nearest point of its label's box, if that is not near it."""
    to = min(max(at[0], box.x0), box.x1), min(max(at[1], box.y0), box.y1)
    if math.dist(at, to) <= near:
        return
    ends = axes.transData.inverted().transform(np.array([at, to]))
    axes.add_line(Line2D(*ends.T, color="0.6", linewidth=0.6, zorder=1))
