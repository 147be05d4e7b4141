"""A schedule in words, and memory over its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from evoplan.planner.plans.plan import Plan
from evoplan.planner.reports.tables import fold, new_table, print_table, step_names
from evoplan.planner.schedules.replay import Moment, Replay
from evoplan.planner.schedules.schedule import (
    Checkpoint,
    Sequence,
)
from evoplan.planner.sizes import exact_size, format_seconds, format_size

if TYPE_CHECKING:
    pass


def print_schedule(plan: Plan, console: Console) -> None:
    """The schedule as nested lines; equal neighbouring blocks are folded."""
    names = step_names(plan.problem)
    for line in fold(list(schedule_lines(plan.schedule, names))):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def schedule_lines(schedule: Sequence, names: list[str], indent: str = "") -> Iterable[str]:
    """One line per recorded step and per checkpoint."""
    for part in schedule.parts:
        wait = f"  [waits on the host: {', '.join(part.wait)}]" if part.wait else ""
        if isinstance(part, Checkpoint):
            first, last = part.span.start, part.span.stop - 1
            counts = Counter(map(str, part.discard))
            discard = ", ".join(f"{name} x{count}" for name, count in counts.most_common(3))
            more = ", ..." if len(counts) > 3 else ""
            yield f"{indent}checkpoint {names[first]} .. {names[last]}  [first pass: {discard}{more}]{wait}"
            yield from schedule_lines(part.body, names, indent + "  ")
        else:
            away = f"  [on the host: {', '.join(part.away)}]" if part.away else ""
            yield f"{indent}{names[part.step]}: {part.strategy}{away}{wait}"


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
    print_table(table, console)
    copies = [moment.seconds for moment in moments if moment.phase.endswith("host")]
    if copies:
        console.print(
            f"{len(copies)} copies between the device and the host, for which it waits "
            f"{format_seconds(sum(copies))} of {format_seconds(result.seconds)}",
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
