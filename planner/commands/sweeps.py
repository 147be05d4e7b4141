"""The frontier of memory and time, of our own models and of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from evoplan.planner.commands.flags import (
    cache_option,
    files_read,
    json_option,
    problem_of,
    problem_options,
    times_option,
)
from evoplan.planner.commands.foreign import swept_from
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, picture_format, write_json, write_text

POINTS = 60  # of a model that somebody wrote, each a simulation of the whole step

if TYPE_CHECKING:
    from evoplan.planner.problems.timing import Times


@click.command()
@problem_options
@times_option
@cache_option
@click.option("--from", "source", metavar="FILE.py:FUNCTION", help="Of a model that somebody wrote.")
@click.option(
    "--points", type=click.IntRange(2, 2000), show_default="every step; of --from 60",
    help="So many budgets, each with its plan's own peak.",
)  # fmt: skip
@click.option("--out", type=click.Path(), help="Write the frontier as JSON here.")
@click.option("--plot", type=click.Path(), help="Draw it here (png, svg or pdf).")
@click.option("--html", type=click.Path(), help="Write a page about it here: one file, nothing to load.")
@json_option
def sweep(
    points: int | None,
    times: Times,
    cache: str | None,
    source: str | None,
    out: str | None,
    plot: str | None,
    html: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """The frontier of memory and time, baselines marked on it. With --from of any model."""
    check_writable(out, plot, html, json_path=json_path, reads=files_read(cache, source=source, **flags))
    if plot is not None:
        picture_format(plot)
    if source is not None:
        document = swept_from(source, flags, POINTS if points is None else points, html)
        steps = document["points"]
    else:
        document, steps = _swept(points, times, cache, html, flags)
    from evoplan.planner.reports.plans import print_sweep
    from evoplan.planner.reports.plot import plot_sweep

    for path in filter(None, (out, json_path)):
        write_json(path, document)
    if plot:
        plot_sweep(document, plot, steps=steps)
    console = console_for_output(json_path=json_path)
    print_sweep(document, console)
    for what, written in (("picture", plot), ("page", html)):
        if written:
            console.print(f"{what} written to {written}", highlight=False, soft_wrap=True)


def _swept(
    points: int | None, times: Times, cache: str | None, html: str | None, flags: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Of a preset: the document, and every step of the frontier."""
    problem = problem_of(**flags)
    if not problem.training:
        raise ValueError("sweep is for training; for inference ask plan for one budget after another")
    with progress("loading torch") as update:
        from evoplan.planner.pages.content import step_names_of
        from evoplan.planner.pages.sweep import Planned, sweep_page
        from evoplan.planner.plans.sweeping import planned_points, steps_of
        from evoplan.planner.plans.sweeping import sweep as sweep_frontier
        from evoplan.planner.problems.timing import cost_with_times
        from evoplan.planner.solvers import Frontier
        from evoplan.planner.solvers.offload_frontier import OffloadFrontier

        asked = problem.budget_bytes
        problem = problem.model_copy(update={"budget_bytes": None})
        costed = cost_with_times(problem, times, cache, progress=lambda name: update(f"tracing {name}"))
        update("solving")
        if problem.host_bytes:  # where it binds, times are known of plans alone
            points = points or POINTS
            frontier: Frontier | OffloadFrontier = OffloadFrontier(costed.table, problem.host_bytes)
            document = sweep_frontier(costed, points, update, frontier)
            steps = document["points"]
        else:
            frontier = Frontier(costed.table)
            document, steps = sweep_frontier(costed, points, update, frontier), steps_of(costed, frontier)
        if html:
            found = planned_points(costed, frontier, points or POINTS, update)
            plans = [Planned(*point) for point in found]
            write_text(html, sweep_page(document, steps, plans, step_names_of(problem), asked))
        return document, steps
