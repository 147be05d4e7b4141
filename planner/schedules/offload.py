"""What a training step keeps in host memory between forward and backward: which, and when it moves.

A part of the first pass lets wait what it keeps, or state that it is the last to read in forward. That
leaves the device while the next part runs forward, is gone when that ends, and is brought back while the next
part is differentiated. So memory depends on the order of the parts alone: where a copy takes longer than the
part that runs beside it, the device waits for it, and time is lost, but no promise.
"""

from __future__ import annotations

from collections.abc import Iterator

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import Liveness, Version
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.kernels import is_opaque
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence, all_runs
from evoplan.planner.schedules.waiting import check_away


def waits(schedule: Sequence) -> bool:
    """Whether anything waits in host memory until its backward."""
    return any(part.wait for part in schedule.parts)


def on_host(schedule: Sequence) -> dict[int, tuple[str, ...]]:
    """What lies in host memory on account of a step: in inference while it runs, in training from its part's
    forward to that part's backward, told by the part's first step.
    """
    of_runs = {run.step: run.away for run in all_runs(schedule) if run.away}
    return of_runs | {part.span.start: part.wait for part in schedule.parts if part.wait}


def last_read(liveness: Liveness, span: range) -> tuple[Version, ...]:
    """State that these steps are the last to read in forward: it may wait once they have run.

    The caller's inputs are not among them: they would not leave the device, since the caller holds them.
    """
    after = liveness.alive(span.stop)
    return tuple(v for v in liveness.entry(span) if liveness.owns(v) and v not in after)


def has_record(strategy: Strategy) -> bool:
    """Whether a run keeps something besides the state that may wait: torch must say where it lies."""
    return not (strategy.in_pieces or is_opaque(strategy))


def record_bytes(cost: StepCost) -> int:
    """How much of what a run keeps besides the state may wait."""
    return cost.preserved_bytes if has_record(cost.strategy) else 0


def waiting_bytes(schedule: Sequence, table: CostTable) -> tuple[int, ...]:
    """Of each part of the first pass, how much of what is kept waits in host memory."""
    return tuple(sum(_sizes(part, table)) for part in schedule.parts)


def _sizes(part: Run | Checkpoint, table: CostTable) -> Iterator[int]:
    for name in part.wait:
        if name != RECORD:
            yield table.state_bytes[name]
        else:
            assert isinstance(part, Run)
            (cost,) = (cost for cost in table.options[part.step] if cost.strategy == part.strategy)
            yield record_bytes(cost)


def check_host(schedule: Sequence, table: CostTable) -> None:
    """Refuse what cannot be done with host memory, in inference and in training.

    Raises:
        ValueError: as `check_away` and `check_waits`; or there is no memory apart from the host's.
    """
    apart = table.host_bandwidth is not None
    if any(run.away for run in all_runs(schedule)):
        if table.training or not apart:
            raise ValueError(
                "state may wait in host memory in inference only, on a device apart from the host"
            )
        check_away(schedule, table.liveness)
    if waits(schedule):
        if not table.training or not apart:
            raise ValueError(
                "what is kept for backward may wait in host memory in training only, on a device apart from "
                "the host"
            )
        check_waits(schedule, table.liveness)


def check_waits(schedule: Sequence, liveness: Liveness) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: something is to wait that later parts need, or that is not there; the step is named.
    """
    for part in schedule.parts:
        may = [version.tensor for version in last_read(liveness, part.span)]
        if isinstance(part, Run) and has_record(part.strategy):
            may.append(RECORD)
        wrong = next((name for name in part.wait if name not in may), None)
        step = part.span.stop - 1
        if wrong is not None:
            raise ValueError(
                f"after step {step} {wrong} cannot wait in host memory: what can is "
                f"{', '.join(may) or 'nothing'}; plan again"
            )
        if len(set(part.wait)) != len(part.wait):
            raise ValueError(f"after step {step} something is to wait twice; plan again")
        if part.wait and part is schedule.parts[-1]:
            raise ValueError(
                f"after step {step}, the last, nothing runs while something leaves the device; plan again"
            )
