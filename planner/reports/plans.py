"""Plans in words: tables for people. Everything here prints; nothing computes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import kind_of
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.tables import describe_problem, new_table, print_table, step_names
from evoplan.planner.schedules.offload import on_host
from evoplan.planner.schedules.schedule import (
    Sequence,
    depth,
    final_strategies,
    forward_runs,
)
from evoplan.planner.sizes import format_seconds, format_size

if TYPE_CHECKING:
    pass


def print_plan(plan: Plan, console: Console) -> None:
    """The decision per submodule, the prediction, and the saving against the baselines."""
    console.print(describe_problem(plan.problem), highlight=False)
    schedule = plan.schedule
    print_table(_decisions(schedule, plan.problem), console)
    print_table(_comparison(plan), console)
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in plan.static.items() if size)
    console.print(f"static: {parts}", highlight=False)
    console.print(
        f"memory {plan.costs['memory']}, time {plan.costs['time']}; "
        f"solved by {plan.solver.name} in {format_seconds(plan.solver.seconds)}",
        highlight=False,
    )
    if plan.predicted.host_bytes:
        most = plan.problem.host_bytes or plan.predicted.host_bytes
        console.print(
            f"in host memory between forward and backward: {format_size(plan.predicted.host_bytes)} "
            f"of {format_size(most)}",
            highlight=False,
        )
    if len(set(plan.rank_peak_bytes)) > 1:
        peaks = ", ".join(map(format_size, plan.rank_peak_bytes))
        console.print(f"peak of each rank: {peaks}", highlight=False)
    if plan.only_whole:
        console.print(
            f"never in pieces: {', '.join(plan.only_whole)}; kept, or run again under a checkpoint",
            highlight=False,
        )
    for certificate in plan.solver.certificates:
        console.print(certificate.in_words(), highlight=False)


def _decisions(schedule: Sequence, problem: Problem) -> Table:
    """Of each submodule: under which strategies it runs backward, and how often forward runs."""
    kinds: dict[str, list[int]] = {}
    for step, name in enumerate(step_names(problem)[: len(schedule.span)]):
        kinds.setdefault(kind_of(name), []).append(step)
    final, runs = final_strategies(schedule), forward_runs(schedule)
    checkpoints = depth(schedule)
    title = (
        f"decision per submodule (checkpoints {checkpoints} deep)"
        if problem.training
        else "decision per submodule"
    )
    waits = on_host(schedule)
    host = ("on the host (blocks)",) if waits else ()
    table = new_table(title, "submodule", "strategy (blocks)", "forward runs", *host)
    for name, steps in kinds.items():
        counts = Counter(str(final[step]) for step in steps)
        text = ", ".join(f"{strategy} ({count})" for strategy, count in counts.most_common())
        most = [runs[step] for step in steps]
        away = Counter(", ".join(waits.get(step, ())) for step in steps)
        waiting = ", ".join(f"{names} ({count})" for names, count in away.most_common() if names)
        forward = f"{min(most)}" if min(most) == max(most) else f"{min(most)}-{max(most)}"
        table.add_row(name, text, forward, *([waiting] if waits else []))
    return table


def _comparison(plan: Plan) -> Table:
    table = new_table(
        "predicted", "schedule", "peak", "activations", "step time", "peak / plan", "time / plan"
    )

    def add(name: str, prediction: Prediction, style: str | None = None) -> None:
        own = plan.predicted
        table.add_row(
            name,
            format_size(prediction.peak_bytes),
            format_size(prediction.activation_bytes),
            format_seconds(prediction.step_seconds),
            f"{prediction.peak_bytes / own.peak_bytes:.2f}",
            f"{prediction.step_seconds / own.step_seconds:.2f}",
            style=style,
        )

    add("plan", plan.predicted, "bold")
    for name, prediction in plan.baselines.items():
        add(name, prediction)
    return table


def print_sweep(document: dict[str, Any], console: Console) -> None:
    """A dozen points of the frontier, and the baselines."""
    table = new_table("frontier", "", "memory", "step time")
    points = document["points"]
    for index in sorted({round(i * (len(points) - 1) / 11) for i in range(12)}):
        point = points[index]
        table.add_row("plan", format_size(point["budget_bytes"]), format_seconds(point["step_seconds"]))
    for name, baseline in document["baselines"].items():
        table.add_row(name, format_size(baseline["peak_bytes"]), format_seconds(baseline["step_seconds"]))
    print_table(table, console)
