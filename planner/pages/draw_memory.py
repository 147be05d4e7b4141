"""Memory over the time of a step, and what its peak is made of, as pictures."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import accumulate

from evoplan.planner.pages.account import Account
from evoplan.planner.pages.svg import Box, el, label, number, ticks, x_axis, y_axis
from evoplan.planner.pages.timing import LAYERS, layers_of, starts_of
from evoplan.planner.sizes import format_seconds, format_size

WIDTH, HEIGHT = 1000, 350
FRAME = Box(86, 34, 896, 256)
BAND = 9  # the strip of phases
ROOM = 1.06  # of the highest thing drawn
Scale = Callable[[float], float]

MOST_STATIC = 0.7  # of the frame
BINS = 1800  # more moments than that are drawn as the largest of each few


def scale_of(account: Account, budget: int | None) -> tuple[int, int]:
    """Bytes at the bottom and at the top of the frame.

    Static memory that would leave little room for the rest is cut off at the bottom, and a budget that is far
    above the peak is not drawn.
    """
    fixed, peak = account.fixed_bytes, account.peak_bytes
    top = budget if budget and peak <= budget < 1.5 * peak else peak
    least = round(fixed - (top - fixed) / 4) if fixed > MOST_STATIC * top else 0
    return least, least + round(ROOM * (top - least))


def draw_memory(account: Account, budget: int | None) -> str:
    """An SVG of what is live at each moment, the peak and the budget marked, phases below."""
    starts, (least, most) = starts_of(account), scale_of(account, budget)
    total = starts[-1] or 1.0

    def x(seconds: float) -> float:
        return FRAME.x + FRAME.width * seconds / total

    def y(size: float) -> float:
        return FRAME.bottom - FRAME.height * max(0, size - least) / (most - least)

    parts = [y_axis(FRAME, most, ticks(most, 5, 2, least), format_size, least)]
    shown = _shown(account)
    heights = [tuple(accumulate(layers)) for layers in layers_of(account)]
    for layer in reversed(range(len(LAYERS))):  # the tallest first: each lower one is drawn over it
        tops = [(starts[end], heights[at][layer]) for at, end in shown]
        parts.append(el("path", d=_steps(tops, x, y), class_=f"m-{LAYERS[layer]}"))
    parts.append(_phases(account, starts, x))
    parts.append(_peak(account, starts, x, y))
    if budget and budget <= most:
        parts.append(el("line", x1=FRAME.x, x2=FRAME.right, y1=y(budget), y2=y(budget), class_="budget"))
    parts.append(
        x_axis(FRAME, [(x(t), _seconds(t, total)) for t in ticks(total, 8)], FRAME.bottom + BAND + 4)
    )
    parts.append(label(FRAME.right, HEIGHT - 6, "predicted time of the step", "end", class_="tick"))
    parts.append(el("g", el("line", class_="cursor", y1=FRAME.y, y2=FRAME.bottom), id="cursor"))
    return el(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", id="memory", tabindex=0,
        aria_label="memory over the time of a step",
    )  # fmt: skip


def _seconds(value: float, total: float) -> str:
    return "0" if value == 0 else format_seconds(value) if total >= 1e-3 else f"{value * 1e6:.3g} us"


def _shown(account: Account) -> list[tuple[int, int]]:
    """Moments that are drawn, each up to the start of the one after its few."""
    moments = account.moments
    size = -(-len(moments) // BINS)
    found = []
    for begin in range(0, len(moments), size):
        few = range(begin, min(begin + size, len(moments)))
        found.append((max(few, key=lambda at: moments[at].peak_bytes), few.stop))
    return found


def _steps(tops: list[tuple[float, int]], x: Scale, y: Scale) -> str:
    """A filled path under steps."""
    path, last = [f"M{number(FRAME.x)} {number(FRAME.bottom)}"], -1
    for end, size in tops:
        if size != last:
            path.append(f"V{number(y(size))}")
            last = size
        path.append(f"H{number(x(end))}")
    return "".join(path) + f"V{number(FRAME.bottom)}Z"


def _phases(account: Account, starts: list[float], x: Scale) -> str:
    """A strip below the frame: neighbours of one phase are one piece."""
    parts, begun = [], 0
    moments = account.moments
    for at in range(1, len(moments) + 1):
        if at < len(moments) and moments[at].phase == moments[begun].phase:
            continue
        left, right = x(starts[begun]), x(starts[at])
        phase = moments[begun].phase
        words = f"{phase}: {account.where(moments[begun])} to {account.where(moments[at - 1])}"
        begun = at
        if right > left:
            parts.append(
                el("rect", el("title", escape(words)), x=left, y=FRAME.bottom + 4, width=right - left,
                   height=BAND, class_=f"p-{phase.replace(' ', '-')}")
            )  # fmt: skip
    return "".join(parts)


def _peak(account: Account, starts: list[float], x: Scale, y: Scale) -> str:
    """The peak, named in the margin above the frame, where nothing else is."""
    at = account.peak_index
    moment = account.moments[at]
    middle, top = x((starts[at] + starts[at + 1]) / 2), y(account.peak_bytes)
    words = f"peak {format_size(account.peak_bytes)}: {moment.phase} of {account.where(moment)}"
    half = len(words) * 0.6 * 12 / 2
    centre = min(max(middle, half + 4), WIDTH - half - 4)
    return (
        el("line", x1=middle, x2=middle, y1=22, y2=top, class_="axis")
        + el("circle", cx=middle, cy=top, r=4, class_="peak")
        + label(centre, 15, words, "middle", class_="strong")
    )
