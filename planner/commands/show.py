"""`evoplan show`: a plan in words, as a page, and as traces for other viewers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from evoplan.planner.commands.flags import cache_option, json_option
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json

if TYPE_CHECKING:
    from evoplan.planner.plans.plan import Plan
    from evoplan.planner.problems.costing import Costed


@dataclass(frozen=True)
class Outputs:
    """Files that are asked for beside the words, and the one that the page takes a measurement from."""

    html: str | None
    verification: str | None
    memory_viz: str | None
    perfetto: str | None

    @property
    def any(self) -> bool:
        """Whether one is."""
        return bool(self.html or self.memory_viz or self.perfetto)

    def said(self) -> list[str]:
        """What has been written where."""
        named = (("page", self.html), ("snapshot", self.memory_viz), ("trace", self.perfetto))
        return [f"{what} written to {path}" for what, path in named if path]


@click.command()
@click.argument("plan_file", type=click.Path())
@cache_option
@click.option("--html", type=click.Path(), help="Write a page about it here: one file, nothing to load.")
@click.option(
    "--verification", type=click.Path(), help="For --html: what `evoplan verify --json` has written."
)
@click.option(
    "--memory-viz", type=click.Path(), help="Write a predicted snapshot for PyTorch's memory viewer here."
)
@click.option("--perfetto", type=click.Path(), help="Write a predicted trace for Perfetto here (JSON).")
@json_option
def show(plan_file: str, cache: str | None, json_path: str | None, **files: Any) -> None:
    """Print a plan: its schedule, its memory over time, where the peak is and why, and the alternatives.

    Times are of the kind that the plan was made with, as far as this machine has them.
    """
    outputs = Outputs(**files)
    reads = (plan_file, cache, outputs.verification)
    check_writable(outputs.html, outputs.memory_viz, outputs.perfetto, json_path=json_path, reads=reads)
    if outputs.verification and not outputs.html:
        raise ValueError("--verification is for the page; add --html FILE")
    from evoplan.planner.fitting.plan import is_fit_plan

    if is_fit_plan(plan_file):
        _show_fit(plan_file, outputs, json_path)
    else:
        _show(plan_file, cache, outputs, json_path)


def _show_fit(plan_file: str, outputs: Outputs, json_path: str | None) -> None:
    """A plan of `evoplan.fit`, from its file alone."""
    from evoplan.planner.fitting.pages import NO_COSTS, content_of_file
    from evoplan.planner.fitting.plan import load_fit_plan
    from evoplan.planner.pages.verified import load_verified
    from evoplan.planner.pages.writing import write_pages

    plan = load_fit_plan(plan_file)
    if outputs.memory_viz or outputs.perfetto:
        raise ValueError(f"{plan_file}: no snapshot and no trace: {NO_COSTS}")
    if outputs.html:
        path = outputs.verification
        verified = load_verified(path, plan.predicted.peak_bytes) if path else None
        write_pages(content_of_file(plan, verified), html=outputs.html)
    if json_path:
        plan.save(json_path)
    console = console_for_output(json_path=json_path)
    console.print(plan.report(), highlight=False, soft_wrap=True)
    for line in outputs.said():
        console.print(line, highlight=False, soft_wrap=True)


def _show(plan_file: str, cache: str | None, outputs: Outputs, json_path: str | None) -> None:
    """A plan of one of our own models, its costs traced anew."""
    from evoplan.cost_model.times_cache import MissingTimesError
    from evoplan.planner.checking.consistency import load_consistent
    from evoplan.planner.plans.recosting import cost_of_plan
    from evoplan.planner.reports.plans import print_plan
    from evoplan.planner.reports.schedules import print_schedule

    found, console = load_consistent(plan_file), console_for_output(json_path=json_path)
    costed, lost = None, None
    try:
        with progress("tracing") as update:
            costed, lost = cost_of_plan(found, cache, update)
    except MissingTimesError as error:
        lost = f"no memory over time, and no alternatives: {error}"
    if outputs.any:
        _write(found, costed, lost or "", outputs)
    print_plan(found, console)
    console.print()
    print_schedule(found, console)
    console.print()
    if costed is not None:
        _show_costs(found, costed, lost, json_path)
    else:
        console.print(lost, highlight=False)
        if json_path:
            write_json(json_path, {"plan": found.to_json()})
    for line in outputs.said():
        console.print(line, highlight=False, soft_wrap=True)


def _write(plan: Plan, costed: Costed | None, lost: str, outputs: Outputs) -> None:
    """The files beside the words."""
    from evoplan.planner.pages.content import content_of_plan
    from evoplan.planner.pages.verified import load_verified
    from evoplan.planner.pages.writing import write_pages

    # What a verification compares first is the first rank's share, where there are several.
    peak = (*plan.rank_peak_bytes, plan.predicted.peak_bytes)[0]
    verified = load_verified(outputs.verification, peak) if outputs.verification else None
    with progress("drawing"):
        content = content_of_plan(plan, costed, lost, verified)
        write_pages(content, outputs.html, outputs.memory_viz, outputs.perfetto)


def _show_costs(plan: Plan, costed: Costed, times_lost: str | None, json_path: str | None) -> None:
    """Memory over time and the alternatives."""
    from evoplan.planner.plans.alternatives import alternatives
    from evoplan.planner.reports.alternatives import alternatives_to_json, print_alternatives
    from evoplan.planner.reports.schedules import print_timeline
    from evoplan.planner.reports.tables import step_names
    from evoplan.planner.schedules.replay import replay

    console = console_for_output(json_path=json_path)
    with progress("comparing"):
        others = alternatives(plan, costed)
    result = replay(plan.schedule, costed.table)
    print_timeline(result, costed.fixed_bytes, step_names(plan.problem), console)
    console.print()
    if times_lost:
        console.print(f"{times_lost}: times below are of the {costed.times.name}", highlight=False)
    print_alternatives(others, console)
    if json_path:
        moments = [
            {**vars(moment), "held_bytes": costed.fixed_bytes + moment.held_bytes,
             "peak_bytes": costed.fixed_bytes + moment.peak_bytes}
            for moment in result.moments
        ]  # fmt: skip
        document = {"plan": plan.to_json(), "timeline": moments, "times": costed.times.name}
        write_json(json_path, document | {"alternatives": alternatives_to_json(others)})
