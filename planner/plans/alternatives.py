"""What a plan would cost if one kind of submodule ran another way throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evoplan.model.running.chain import Chain
from evoplan.model.running.strategy import Strategy
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import Costed, kind_of
from evoplan.planner.schedules.offload import has_record
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence


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
    schedule, budget = plan.schedule, plan.problem.budget_bytes
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
            chosen = strategy if part.step in steps else part.strategy
            there = part.wait if has_record(chosen) else tuple(name for name in part.wait if name != RECORD)
            return replace(part, strategy=chosen, wait=there)
        discard = tuple(
            strategy if step in steps else before
            for step, before in zip(part.span, part.discard, strict=True)
        )
        return replace(part, body=with_strategy(part.body, steps, strategy), discard=discard)

    return Sequence(tuple(map(one, schedule.parts)))
