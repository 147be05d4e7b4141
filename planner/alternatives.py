"""What a plan would cost if one kind of submodule ran another way throughout."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from evoplan.model.chain import Chain
from evoplan.model.strategy import Strategy
from evoplan.planner.costing import Costed, kind_of
from evoplan.planner.plan import Plan
from evoplan.planner.report import new_table
from evoplan.planner.schedule import Checkpoint, Run, Sequence
from evoplan.planner.sizes import format_seconds, format_size

SHOWN = 4  # of each submodule: the fastest that fit, and the fastest that do not


@dataclass(frozen=True)
class Alternative:
    """A plan in which one kind of submodule runs under one strategy in every pass; all else is as it was.

    Attributes:
        peak_bytes, step_seconds: predicted for the whole plan.
        more_bytes, more_seconds: than the plan itself.
        fits: into the budget.
    """

    submodule: str
    strategy: str
    peak_bytes: int
    step_seconds: float
    more_bytes: int
    more_seconds: float
    fits: bool


def alternatives(plan: Plan, costed: Costed) -> list[Alternative]:
    """Of each kind of submodule, every strategy that it offers; the fastest plans first."""
    schedule, budget = plan.sequence(), plan.problem.budget_bytes
    now = costed.predict(schedule)
    kinds: dict[str, list[int]] = {}
    for step in Chain.of(costed.model).steps:
        kinds.setdefault(kind_of(step.name), []).append(step.index)
    found = []
    for kind, steps in kinds.items():
        offered = [cost.strategy for cost in costed.table.options[steps[0]]]
        rows = []
        for strategy in offered:
            other = costed.predict(with_strategy(schedule, frozenset(steps), strategy))
            rows.append(
                Alternative(
                    submodule=kind,
                    strategy=str(strategy),
                    peak_bytes=other.peak_bytes,
                    step_seconds=other.step_seconds,
                    more_bytes=other.peak_bytes - now.peak_bytes,
                    more_seconds=other.step_seconds - now.step_seconds,
                    fits=budget is None or other.peak_bytes <= budget,
                )
            )
        found += sorted(rows, key=lambda row: (row.step_seconds, row.peak_bytes))
    return found


def with_strategy(schedule: Sequence, steps: frozenset[int], strategy: Strategy) -> Sequence:
    """The schedule with some steps under another strategy in every pass."""

    def one(part: Run | Checkpoint) -> Run | Checkpoint:
        if isinstance(part, Run):
            return Run(part.step, strategy if part.step in steps else part.strategy, part.away)
        discard = tuple(
            strategy if step in steps else before
            for step, before in zip(part.span, part.discard, strict=True)
        )
        return Checkpoint(with_strategy(part.body, steps, strategy), discard)

    return Sequence(tuple(map(one, schedule.parts)))


def print_alternatives(found: list[Alternative], console: Console) -> None:
    """A few of each submodule."""
    table = new_table(
        "had a submodule run another way in every block", "submodule", "strategy", "step time", "peak", ""
    )
    for kind in dict.fromkeys(row.submodule for row in found):
        own = [row for row in found if row.submodule == kind]
        fit, not_fit = ([row for row in own if row.fits is fits] for fits in (True, False))
        named = [row for row in own if row.strategy == "whole"]
        shown = dict.fromkeys([*fit[:SHOWN], *not_fit[: 1 if fit else SHOWN], *named])
        for row in sorted(shown, key=lambda row: row.step_seconds):
            table.add_row(
                kind,
                row.strategy,
                _signed(format_seconds(abs(row.more_seconds)), row.more_seconds),
                _signed(format_size(abs(row.more_bytes)), row.more_bytes),
                "" if row.fits else "does not fit",
            )
            kind = ""
    console.print(table)


def _signed(text: str, value: float) -> str:
    return "as now" if value == 0 else ("+" if value > 0 else "-") + text


def alternatives_to_json(found: list[Alternative]) -> list[dict[str, Any]]:
    """All of it as plain types."""
    return [asdict(row) for row in found]
