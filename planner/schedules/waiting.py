"""State that waits in host memory: between which steps, and where it lies meanwhile.

In inference a tensor of the state that some steps don't read may leave the device while they run. The
caller's inputs stay where they are unless they are donated: they would not leave the device, since the caller
holds them.
"""

from __future__ import annotations

from collections.abc import Iterator

from evoplan.cost_model.liveness import Liveness
from evoplan.planner.schedules.schedule import Run, Sequence, all_runs


def may_wait(liveness: Liveness, step: int) -> tuple[str, ...]:
    """State tensors that may lie on the host while a step runs: the chain's own, read by later steps only."""
    read = liveness.entry(range(step, step + 1))
    return tuple(v.tensor for v in liveness.alive(step) if liveness.owns(v) and v not in read)


def moves(schedule: Sequence) -> Iterator[tuple[Run | None, tuple[str, ...], tuple[str, ...]]]:
    """Each run in order, and what leaves the device before it and what then comes back.

    The last, None, stands for the end, when everything comes back.
    """
    away: tuple[str, ...] = ()
    for run in (*all_runs(schedule), None):
        after = () if run is None else run.away
        yield run, _without(after, away), _without(away, after)
        away = after


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def check_away(schedule: Sequence, liveness: Liveness) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: a step needs what is on the host, or the chain does not own it; the step is named.
    """
    known = {version.tensor for version in liveness.alive(0)}
    for run in all_runs(schedule):
        for name in _without(run.away, may_wait(liveness, run.step)):
            reads = [version.tensor for version in liveness.entry(run.span)]
            why = "it is the caller's input until a step rewrites it, or nobody needs it any longer"
            if name not in known:
                why = f"the state has {', '.join(sorted(known))}"
            elif name in reads:
                why = "the step reads it"
            raise ValueError(f"step {run.step} cannot have {name} in host memory: {why}; plan again")
