"""SVG by hand: elements, axes, and labels that lie neither on each other nor outside of their frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import escape

GLYPH = 0.6  # width of a letter over its size: more than that of any in the fonts that the page asks for


def el(tag: str, *children: str, **attributes: object) -> str:
    """An element; `class_` and `stroke_width` are the attributes class and stroke-width, None is left out.

    Attributes are escaped; children are markup.
    """
    named = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
    text = "".join(f' {name}="{_value(value)}"' for name, value in named.items() if value is not None)
    return f"<{tag}{text}>{''.join(children)}</{tag}>" if children else f"<{tag}{text}/>"


def _value(value: object) -> str:
    return escape(number(value)) if isinstance(value, float) else escape(str(value))


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def label(x: float, y: float, words: str, anchor: str = "start", **attributes: object) -> str:
    """A text at its baseline."""
    return el("text", escape(words), x=x, y=y, text_anchor=anchor, **attributes)


def shortened(words: str, width: float, size: float) -> str:
    """As much of the end of a name as fits into a width, of a font's size."""
    most = max(2, int(width / (GLYPH * size)))
    return words if len(words) <= most else "…" + words[1 - most :]


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    def meets(self, other: Box) -> bool:
        """Whether they have an area in common."""
        across = self.x < other.right and other.x < self.right
        return across and self.y < other.bottom and other.y < self.bottom

    def holds(self, other: Box) -> bool:
        """Whether the other lies in it."""
        across = self.x <= other.x and other.right <= self.right
        return across and self.y <= other.y and other.bottom <= self.bottom


def placed(
    points: Iterable[tuple[float, float, str]], frame: Box, size: float, taken: Iterable[Box] = ()
) -> Iterator[tuple[float, float, str, Box]]:
    """A place for the label of each point, near it; a label that finds none is left out.

    Args:
        taken: what labels must not lie on, besides each other and the points.
    """
    points = list(points)
    used = [*taken, *(Box(x - 5, y - 5, 10, 10) for x, y, _ in points)]
    for x, y, words in points:
        width, height = GLYPH * size * len(words), size * 1.2
        for box in _around(x, y, width, height):
            if frame.holds(box) and not any(box.meets(other) for other in used):
                used.append(box)
                yield x, y, words, box
                break


def _around(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """Boxes at growing distances of a point: right, above, below and left of it."""
    for far in (11, 18, 28, 42, 60, 82):
        for turn in range(12):
            angle = -math.pi / 6 + turn * math.pi / 6
            at_x, at_y = x + far * math.cos(angle), y + far * math.sin(angle)
            left = (
                at_x if math.cos(angle) > 0.1 else at_x - width if math.cos(angle) < -0.1 else x - width / 2
            )
            yield Box(left, at_y - height / 2, width, height)


def ticks(most: float, count: int = 5, base: float = 10, least: float = 0) -> list[float]:
    """From `least` to `most`, about so many round numbers; `base` 2 rounds to powers of two."""
    if most <= least:
        return [least]
    rough = (most - least) / count
    if base == 2:
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(least / step), int(most / step * 1.0001) + 1)]


def y_axis(
    frame: Box, most: float, values: list[float], words: Callable[[float], str], least: float = 0
) -> str:
    """Lines across a frame from `least` to `most`, and what they stand for."""
    marks = []
    for value in values:
        y = frame.bottom - frame.height * (value - least) / (most - least)
        marks.append(el("line", x1=frame.x, x2=frame.right, y1=y, y2=y, class_="grid"))
        marks.append(label(frame.x - 6, y + 4, words(value), "end", class_="tick"))
    return "".join(marks)


def x_axis(frame: Box, positions: list[tuple[float, str]], y: float | None = None) -> str:
    """Words below a frame, those that have room."""
    marks, end = [], -math.inf
    for x, words in positions:
        half = GLYPH * 11 * len(words) / 2
        middle = min(max(x, half + 2), frame.right + 14 - half)
        if middle - half < end + 6:
            continue
        end = middle + half
        marks.append(el("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="axis"))
        marks.append(label(middle, (frame.bottom if y is None else y) + 16, words, "middle", class_="tick"))
    return "".join(marks)
