"""Plans in words: tables for people. Everything here prints; nothing computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from evoplan.model.running.chain import Chain
from evoplan.planner.plans.plan import Certificate, Plan
from evoplan.planner.problems.costing import kind_of, planned_model
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.replay import Moment, Replay
from evoplan.planner.schedules.schedule import (
    Checkpoint,
    Sequence,
    all_runs,
    depth,
    final_strategies,
    forward_runs,
)
from evoplan.planner.sizes import exact_size, format_seconds, format_size

if TYPE_CHECKING:
    from evoplan.planner.checking.verify import Verification


def describe_problem(problem: Problem) -> str:
    """One line."""
    config, shape = problem.config, problem.shape
    budget = "no budget" if problem.budget_bytes is None else f"budget {exact_size(problem.budget_bytes)}"
    ranks = f" on each of {problem.ranks} ranks" if problem.ranks > 1 else ""
    return (
        f"{problem.model}: {config.n_block} blocks, {shape}, "
        f"{problem.precision} {problem.mode} on {problem.device}, {budget}{ranks}"
    )


def new_table(title: str, *columns: str) -> Table:
    """The first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def print_plan(plan: Plan, console: Console) -> None:
    """The decision per submodule, the prediction, and the saving against the baselines."""
    console.print(describe_problem(plan.problem), highlight=False)
    schedule = plan.sequence()
    console.print(_decisions(schedule, plan.problem))
    console.print(_comparison(plan))
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in plan.static.items() if size)
    console.print(f"static: {parts}", highlight=False)
    console.print(
        f"memory {plan.costs['memory']}, time {plan.costs['time']}; "
        f"solved by {plan.solver.name} in {format_seconds(plan.solver.seconds)}",
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
        console.print(_certificate(certificate), highlight=False)


def _certificate(found: Certificate) -> str:
    """What is proven, in a sentence."""
    nested = {None: "nested to any depth", 0: "not used", 1: "at most one deep"}
    depths = nested.get(found.max_depth, f"at most {found.max_depth} deep")
    of = f"certificate ({found.method}): persistent schedules, checkpoints {depths}, as charged by dp: "
    if found.bound_seconds is None:
        return f"{of}none fits this budget (proved in {format_seconds(found.seconds)})"
    proved = f"none is faster than {format_seconds(found.bound_seconds)}"
    best = "none is known to fit"
    if found.best_seconds is not None:
        best = f"the best known takes {format_seconds(found.best_seconds)}"
        best += f", a gap of {found.gap:.2%}" if found.gap is not None else ""
    return f"{of}{proved}; {best} (proved in {format_seconds(found.seconds)})"


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
    waits = {run.step: run.away for run in all_runs(schedule) if run.away}
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


@cache
def step_names(problem: Problem) -> list[str]:
    """Qualified names of the steps that a problem's plan is for, in order."""
    return [step.name for step in Chain.of(planned_model(problem)).steps]


def print_schedule(plan: Plan, console: Console) -> None:
    """The schedule as nested lines; equal neighbouring blocks are folded."""
    names = step_names(plan.problem)
    for line in fold(list(schedule_lines(plan.sequence(), names))):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def schedule_lines(schedule: Sequence, names: list[str], indent: str = "") -> Iterable[str]:
    """One line per recorded step and per checkpoint."""
    for part in schedule.parts:
        if isinstance(part, Checkpoint):
            first, last = part.span.start, part.span.stop - 1
            counts = Counter(map(str, part.discard))
            discard = ", ".join(f"{name} x{count}" for name, count in counts.most_common(3))
            more = ", ..." if len(counts) > 3 else ""
            yield f"{indent}checkpoint {names[first]} .. {names[last]}  [first pass: {discard}{more}]"
            yield from schedule_lines(part.body, names, indent + "  ")
        else:
            away = f"  [on the host: {', '.join(part.away)}]" if part.away else ""
            yield f"{indent}{names[part.step]}: {part.strategy}{away}"


def fold(lines: list[str], limit: int = 60) -> list[str]:
    """At most `limit` lines: the middle is counted, not shown."""
    if len(lines) <= limit:
        return lines
    half = limit // 2
    return [
        *lines[:half],
        f"... {len(lines) - 2 * half} lines more; all are in the plan file ...",
        *lines[-half:],
    ]


def print_timeline(result: Replay, fixed_bytes: int, names: list[str], console: Console) -> None:
    """Where the memory goes over the step, and what is live at the peak."""
    table = new_table("memory timeline (each row: the largest moment of a phase in a sixteenth of the step)",
                   "phase", "step", "held before", "peak")  # fmt: skip
    moments = result.moments
    size = max(1, -(-len(moments) // 16))
    peak = result.peak
    for start in range(0, len(moments), size):
        moment = max(moments[start : start + size], key=lambda m: m.peak_bytes)
        where = _where(moment, names)
        table.add_row(
            moment.phase, where, format_size(fixed_bytes + moment.held_bytes),
            format_size(fixed_bytes + moment.peak_bytes), style="bold" if moment is peak else None,
        )  # fmt: skip
    console.print(table)
    copies = [moment.seconds for moment in moments if moment.phase.endswith("host")]
    if copies:
        console.print(
            f"{len(copies)} copies between the device and the host, {format_seconds(sum(copies))} of "
            f"{format_seconds(result.seconds)}",
            highlight=False,
        )
    gradients = ", gradients included" if any(moment.phase == "backward" for moment in moments) else ""
    console.print(
        f"peak {exact_size(fixed_bytes + peak.peak_bytes)} in {peak.phase} of {_where(peak, names)}: "
        f"{format_size(fixed_bytes)} static, {format_size(peak.held_bytes)} kept by earlier steps, "
        f"{format_size(peak.peak_bytes - peak.held_bytes)} for the step itself{gradients}",
        highlight=False,
    )


def _where(moment: Moment, names: list[str]) -> str:
    """The step of a moment, by name."""
    if moment.step is not None:
        return names[moment.step]
    return "the loss" if moment.phase == "loss" else "the end"


def print_verification(found: Verification, console: Console) -> None:
    """Predicted beside measured."""
    table = new_table(f"verification ({found.backend})", "", "predicted", "measured", "without plan")

    def size(value: int | None) -> str:
        return "-" if value is None else format_size(value)

    def time(value: float | None) -> str:
        return "-" if value is None else format_seconds(value)

    table.add_row(
        "peak",
        size(found.predicted_peak_bytes),
        size(found.measured_peak_bytes),
        size(found.unplanned_peak_bytes),
    )
    static = found.static_bytes
    table.add_row(
        "activations",
        size(found.predicted_peak_bytes - static),
        size(found.measured_peak_bytes - static),
        size(None if found.unplanned_peak_bytes is None else found.unplanned_peak_bytes - static),
    )
    table.add_row(
        "step time",
        time(found.predicted_step_seconds),
        time(found.measured_step_seconds),
        time(found.unplanned_step_seconds),
    )
    console.print(table)
    for name, error in (("loss", found.max_loss_error), ("gradient", found.max_gradient_error)):
        if error is not None:
            console.print(
                f"largest {name} error {error:.2g} (tolerance {found.tolerances[name]:.0e})", highlight=False
            )
    if found.gradient_error_beyond_rounding is not None:
        console.print(
            "against single precision the plan's gradients are off by at most "
            f"{found.gradient_error_beyond_rounding:.2g} more than the plain model's",
            highlight=False,
        )
    console.print("ok" if found.ok else "FAILED", style="green" if found.ok else "red")


def print_rank_verifications(results: list[Verification], console: Console) -> None:
    """Of several ranks, what each has found."""
    if len(results) == 1:
        return
    table = new_table(
        "ranks", "rank", "predicted peak", "measured", "measured / predicted", "gradient error", ""
    )
    for rank, found in enumerate(results):
        error = found.max_gradient_error
        table.add_row(
            str(rank),
            format_size(found.predicted_peak_bytes),
            format_size(found.measured_peak_bytes),
            f"{found.measured_peak_bytes / found.predicted_peak_bytes:.4f}",
            "-" if error is None else f"{error:.2g}",
            "ok" if found.ok else "FAILED",
        )
    console.print(table)


def print_sweep(document: dict[str, Any], console: Console) -> None:
    """A dozen points of the frontier, and the baselines."""
    table = new_table("frontier", "", "peak", "step time")
    points = document["points"]
    for index in sorted({round(i * (len(points) - 1) / 11) for i in range(12)}):
        point = points[index]
        table.add_row("plan", format_size(point["peak_bytes"]), format_seconds(point["step_seconds"]))
    for name, baseline in document["baselines"].items():
        table.add_row(name, format_size(baseline["peak_bytes"]), format_seconds(baseline["step_seconds"]))
    console.print(table)


def print_ranks(ranks: list[dict[str, Any]], plan: Plan, kind: str, console: Console) -> None:
    """Predicted beside measured of each rank that ran a plan."""
    seconds = f"{format_seconds(plan.predicted.step_seconds)} ({plan.costs['time']})"
    budget = plan.problem.budget_bytes
    if len(ranks) == 1:
        (row,) = ranks
        console.print(
            f"peak: predicted {format_size(row['predicted_peak_bytes'])}, measured "
            f"{format_size(row['measured_peak_bytes'])} ({kind}-allocator)"
            + (f", budget {exact_size(budget)}" if budget else ""),
            highlight=False,
        )
        if row["step_seconds"] is not None:
            console.print(
                f"step time: predicted {seconds}, measured {format_seconds(row['step_seconds'])}",
                highlight=False,
            )
        return
    console.print(f"step time: predicted {seconds}; peaks by the {kind} allocator", highlight=False)
    table = new_table("each rank", "rank", "peak predicted", "measured", "measured / predicted", "step time")
    for row in ranks:
        predicted, measured = row["predicted_peak_bytes"], row["measured_peak_bytes"]
        table.add_row(
            str(row["rank"]),
            format_size(predicted),
            format_size(measured),
            f"{measured / predicted:.4f}",
            "-" if row["step_seconds"] is None else format_seconds(row["step_seconds"]),
        )
    console.print(table)
