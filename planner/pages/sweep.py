"""A page about a frontier: the picture, and of each point what its plan does with every submodule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from evoplan.cost_model.devices import DEVICES
from evoplan.planner.pages.content import Frontier
from evoplan.planner.pages.draw_frontier import Places, draw_frontier
from evoplan.planner.pages.page import html_page
from evoplan.planner.pages.stack import Cell, decisions
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.schedules.schedule import Schedule
from evoplan.planner.sizes import exact_size, format_seconds, format_size

SEEN = 1500  # columns of the picture that can be told apart
ROWS = 12  # points in the table under the picture


@dataclass(frozen=True)
class Planned:
    """A point whose plan is known: its budget, what it needs, and its schedule."""

    budget_bytes: int
    predicted: Prediction
    schedule: Schedule


def sweep_page(
    document: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    plans: Sequence[Planned],
    names: Sequence[str],
    budget: int | None = None,
) -> str:
    """The page as a text.

    Args:
        document: as `evoplan sweep` writes it.
        steps: of the frontier, {budget_bytes, step_seconds}, all of them or a sample.
        plans: points to look at, from the least budget on.
        names: of the steps of each schedule.
        budget: in bytes, to be marked.
    """
    marks = {
        name: (int(one["peak_bytes"]), float(one["step_seconds"]))
        for name, one in document["baselines"].items()
    }
    line = tuple((int(step["budget_bytes"]), float(step["step_seconds"])) for step in steps)
    found = Frontier(_seen(line), marks, budget, _memories(line, marks))
    places = Places(found)
    points = [_point(plan, names, places) for plan in plans]
    about = f"memory {document['costs']['memory']}, time {document['costs']['time']}"
    static = format_size(document["static_bytes"])
    drawn = draw_frontier(found, [(one.budget_bytes, one.predicted.step_seconds) for one in plans])
    body = (
        f"<header><h1>{escape(document['title'])}</h1><p>{escape(about)}; static memory {static}; "
        f"{len(line)} steps of the frontier</p></header>"
        '<section><h2>Memory and time</h2><p class="small">line: the fastest plan within each budget; dots: '
        'what people do by hand; dotted: what devices have. <span class="screen">Point at the line, or focus '
        "the picture and use the arrow keys, to see what the plan does there.</span></p>"
        f'<div id="frontier" tabindex="0">{drawn}</div>{_panel(points[-1])}</section>'
        f"{_table(plans, marks)}"
    )
    return html_page(f"{document['title']}: memory and time", body, {"points": points}, "sweep.js")


def _seen(line: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The steps that can be told apart in a picture: the first and the last in each of its columns."""
    width = math.log(line[-1][0] / line[0][0]) or 1.0
    columns = [int(SEEN * math.log(size / line[0][0]) / width) for size, _ in line]
    last = len(line) - 1
    return tuple(
        point
        for at, point in enumerate(line)
        if at in (0, last) or columns[at] != columns[at - 1] or columns[at] != columns[at + 1]
    )


def _memories(line: Sequence[tuple[int, float]], marks: dict[str, tuple[int, float]]) -> tuple[int, ...]:
    """What devices of the table have, as far as the picture reaches."""
    most = max(line[-1][0], *(size for size, _ in marks.values()))
    sizes = {device.memory_bytes for device in DEVICES.values() if device.memory_bytes is not None}
    return tuple(sorted(size for size in sizes if line[0][0] <= size <= most))


def _point(plan: Planned, names: Sequence[str], places: Places) -> dict[str, Any]:
    """What the script shows of a point, in words and where it is."""
    predicted, done = plan.predicted, decisions(plan.schedule, names)
    deepest = max((one.level + 1 for one in done.brackets), default=0)
    rows: dict[str, list[Cell]] = {}
    for cell in done.cells:
        rows.setdefault(cell.row, []).append(cell)
    return {
        "x": round(places.x(plan.budget_bytes), 2),
        "y": round(places.y(predicted.step_seconds), 2),
        "title": f"budget {exact_size(plan.budget_bytes)}",
        "words": f"peak {exact_size(predicted.peak_bytes)}; step {format_seconds(predicted.step_seconds)}; "
        + (f"checkpoints {deepest} deep" if deepest else "no checkpoints"),
        "rows": [[name, _counted(c.strategy for c in cells), _runs(cells)] for name, cells in rows.items()],
    }


def _counted(strategies: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in Counter(strategies).most_common())


def _runs(cells: Sequence[Cell]) -> str:
    runs = sorted({cell.runs for cell in cells})
    return str(runs[0]) if len(runs) == 1 else f"{runs[0]}-{runs[-1]}"


def _panel(point: dict[str, Any]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in point["rows"]
    )
    return (
        f'<div id="moment" aria-live="polite"><h3>{escape(point["title"])}</h3>'
        f'<p class="small">{escape(point["words"])}</p><table><thead><tr><th>submodule</th>'
        f"<th>strategy (blocks)</th><th>forward runs</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table(plans: Sequence[Planned], marks: dict[str, tuple[int, float]]) -> str:
    """A dozen of the points, and the baselines."""
    few = sorted({round(at * (len(plans) - 1) / (ROWS - 1)) for at in range(ROWS)})
    rows: list[tuple[str, int | None, int, float]] = [
        ("plan", plans[at].budget_bytes, plans[at].predicted.peak_bytes, plans[at].predicted.step_seconds)
        for at in few
    ]
    rows += [(name, None, size, seconds) for name, (size, seconds) in marks.items()]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{'-' if budget is None else format_size(budget)}</td>"
        f"<td>{format_size(peak)}</td><td>{format_seconds(seconds)}</td></tr>"
        for name, budget, peak, seconds in rows
    )
    return (
        "<section><h2>Points</h2><table><thead><tr><th></th><th>budget</th><th>peak</th><th>step</th></tr>"
        f"</thead><tbody>{body}</tbody></table></section>"
    )
