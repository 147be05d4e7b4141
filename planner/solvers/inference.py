"""Inference: without backward nothing is preserved, so the fastest schedule is a shortest path.

A step's memory depends on its strategy and on which tensors of the state wait in host memory meanwhile, and
on nothing that came before. So the nodes are (step, tensors away); each takes the fastest strategy that fits
beside what is on the device, and an edge costs the copies between two such sets. The state has few tensors,
so every set is tried: the path is the optimum, for the charges of the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Run, Sequence
from evoplan.planner.schedules.waiting import may_wait
from evoplan.planner.solvers.frontier import InfeasibleError

Away = tuple[str, ...]


@dataclass(frozen=True)
class _Path:
    """A way to the end of a step: its last run, and the path before it."""

    seconds: float
    run: Run | None = None
    before: _Path | None = None

    def runs(self) -> list[Run]:
        """From the first on."""
        found: list[Run] = []
        path: _Path | None = self
        while path is not None and path.run is not None:
            found.append(path.run)
            path = path.before
        return found[::-1]


def inference_schedule(table: CostTable, budget_bytes: int | None) -> Sequence:
    """The fastest schedule within a budget; None is unlimited.

    Raises:
        InfeasibleError: some step fits under no strategy, whatever waits on the host.
    """
    budget = float("inf") if budget_bytes is None else budget_bytes
    paths: dict[Away, _Path] = {(): _Path(0.0)}
    for step, options in enumerate(table.options):
        reached: dict[Away, _Path] = {}
        for away in _sets(table, step):
            held = _held(table, step, away)
            fitting = [cost for cost in options if held + cost.discard_bytes <= budget]
            if fitting and paths:
                cost = min(fitting, key=lambda cost: cost.discard_seconds)
                seconds, before = _arrive(table, paths, away)
                reached[away] = _Path(seconds + cost.discard_seconds, Run(step, cost.strategy, away), before)
        paths = reached
    ends = table.liveness.alive(0), table.liveness.outputs  # of both, all is on the device
    if not paths or max(map(table.bytes_of, ends)) > budget:
        raise InfeasibleError(int(budget), replay(least_schedule(table), table))
    _, last = _arrive(table, paths, ())  # everything comes back
    return Sequence(tuple(last.runs()))


def _arrive(table: CostTable, paths: dict[Away, _Path], away: Away) -> tuple[float, _Path]:
    """The fastest way to have exactly `away` on the host; its seconds, copies included."""

    def seconds(item: tuple[Away, _Path]) -> float:
        moved = sum(table.state_bytes[name] for name in set(item[0]) ^ set(away))
        return item[1].seconds + (moved / table.host_bandwidth if moved and table.host_bandwidth else 0.0)

    best = min(paths.items(), key=seconds)
    return seconds(best), best[1]


def least_schedule(table: CostTable) -> Sequence:
    """A schedule of the least peak: at each step all that may be is away, and the run is the smallest."""
    runs = []
    for step, options in enumerate(table.options):
        *_, away = _sets(table, step)
        runs.append(Run(step, min(options, key=lambda cost: cost.discard_bytes).strategy, away))
    return Sequence(tuple(runs))


def _held(table: CostTable, step: int, away: Away) -> int:
    """Bytes of the state on the device before a step."""
    return table.bytes_of(version for version in table.liveness.alive(step) if version.tensor not in away)


def _sets(table: CostTable, step: int) -> Iterator[Away]:
    """Every set of tensors that may wait while a step runs; the empty one first."""
    names = may_wait(table.liveness, step) if table.host_bandwidth else ()
    for count in range(len(names) + 1):
        yield from combinations(names, count)
