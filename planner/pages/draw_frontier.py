"""The frontier of memory and time as a picture, with what people do by hand on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from evoplan.planner.pages.content import Frontier
from evoplan.planner.pages.svg import Box, el, label, number, placed, ticks, x_axis, y_axis
from evoplan.planner.sizes import format_seconds, format_size

WIDTH, HEIGHT = 1000, 340
FRAME = Box(86, 30, 896, 262)
SIZE = 12


class Places:
    """Where sizes and times are in the picture: memory on a logarithmic scale, time from 0 on."""

    def __init__(self, found: Frontier) -> None:
        sizes = [size for size, _ in found.points] + [size for size, _ in found.marks.values()]
        if found.budget is not None:
            sizes.append(found.budget)
        self.low, self.high = math.log(min(sizes) / 1.08), math.log(max(sizes) * 1.15)
        self.most = _slowest(found)

    def x(self, size: float) -> float:
        """Of so many bytes."""
        return FRAME.x + FRAME.width * (math.log(size) - self.low) / (self.high - self.low)

    def y(self, seconds: float) -> float:
        """Of so many seconds; what is slower than the frame is high lies on its upper edge."""
        return FRAME.bottom - FRAME.height * min(seconds, self.most) / self.most


def draw_frontier(found: Frontier, targets: Sequence[tuple[float, float]] = ()) -> str:
    """An SVG: step time against peak memory on a logarithmic scale, the budget a line across.

    Args:
        targets: (bytes, seconds) of points that a script shows when they are pointed at.
    """
    places = Places(found)
    x, y, most, low, high = places.x, places.y, places.most, places.low, places.high
    parts = [y_axis(FRAME, most, ticks(most), lambda t: format_seconds(t) if t else "0")]
    parts.append(x_axis(FRAME, [(x(size), format_size(size)) for size in _sizes(low, high)]))
    if found.points:
        # Left out: what is slower than the frame is high, by which the last bytes are bought.
        line = [(size, seconds) for size, seconds in found.points if seconds <= most]
        path = "".join(
            f"M{number(x(size))} {number(y(seconds))}" if at == 0
            else f"H{number(x(size))}V{number(y(seconds))}"
            for at, (size, seconds) in enumerate(line)
        )  # fmt: skip
        parts.append(el("path", d=path, class_="frontier"))
    parts += [el("circle", cx=x(size), cy=y(seconds), r=5, class_="target") for size, seconds in targets]
    points = [(x(size), y(seconds), name) for name, (size, seconds) in found.marks.items()]
    taken = []
    if found.budget is not None:
        parts.append(_budget(x(found.budget), found.budget))
        taken.append(Box(x(found.budget) - 2, FRAME.y, 4, FRAME.height))
    drawn, names = _memories([(x(size), size) for size in found.memories])
    parts += drawn
    taken += names
    parts += [
        el("circle", el("title", f"{name}"), cx=at_x, cy=at_y, r=6 if name == "plan" else 4.5,
           class_="this" if name == "plan" else "baseline")
        for at_x, at_y, name in points
    ]  # fmt: skip
    curve = _along([(x(size), y(seconds)) for size, seconds in found.points if seconds <= most])
    frame = Box(FRAME.x, FRAME.y, FRAME.width, FRAME.height)
    for at_x, at_y, name, box in placed(points, frame, SIZE, [*taken, *curve]):
        middle = box.x + box.width / 2
        if math.hypot(middle - at_x, box.y + box.height / 2 - at_y) > 40 + box.width / 2:
            parts.append(el("line", x1=at_x, y1=at_y, x2=middle, y2=box.y + box.height / 2, class_="axis"))
        parts.append(
            label(middle, box.bottom - 3, name, "middle", class_="strong" if name == "plan" else None)
        )
    parts.append(label(FRAME.right, HEIGHT - 6, "peak memory (logarithmic)", "end", class_="tick"))
    parts.append(label(8, 14, "step time", class_="tick"))
    return el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="memory and time")


def _slowest(found: Frontier) -> float:
    """Seconds at the top of the frame."""
    marked = max((seconds for _, seconds in found.marks.values()), default=0.0)
    planned = max((seconds for _, seconds in found.points), default=0.0)
    return 1.12 * max(marked, min(planned, 2 * marked)) or 1.0


def _budget(x: float, budget: int) -> str:
    words = f"budget {format_size(budget)}"
    half = 0.6 * SIZE * len(words) / 2
    centre = min(max(x, 78 + half), WIDTH - half - 4)  # right of what the axis is called
    return el("line", x1=x, x2=x, y1=20, y2=FRAME.bottom, class_="budget") + label(
        centre, 15, words, "middle"
    )


def _memories(memories: list[tuple[float, int]]) -> tuple[list[str], list[Box]]:
    """Thin lines across, named at their feet where there is room, and what the names cover."""
    parts, taken = [], []
    end = FRAME.x
    for x, size in memories:
        words = format_size(size)
        parts.append(el("line", x1=x, x2=x, y1=FRAME.y, y2=FRAME.bottom, class_="memory"))
        width = 0.6 * 11 * len(words)
        if x + 3 >= end and x + 3 + width <= FRAME.right:
            parts.append(label(x + 3, FRAME.bottom - 5, words, class_="tick"))
            taken.append(Box(x + 3, FRAME.bottom - 16, width, 14))
            end = x + 9 + width
    return parts, taken


def _along(points: list[tuple[float, float]]) -> list[Box]:
    """What steps through points cover."""
    flat = [Box(x, y - 2, end - x, 4) for (x, y), (end, _) in pairwise(points)]
    return flat + [Box(x - 2, min(y, top), 4, abs(y - top)) for (_, top), (x, y) in pairwise(points)]


def _sizes(low: float, high: float) -> list[float]:
    """Round sizes in a range of logarithms: powers of two, or even steps where it spans few of them."""
    least, most = math.exp(low), math.exp(high)
    if most / least > 12:
        powers = range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)
        return [2.0**power for power in powers]
    unit = 1024.0 ** int(math.log(least, 1024))
    return [unit * value for value in ticks(most / unit, 8, least=least / unit)]
