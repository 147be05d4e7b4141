"""Every schedule of a short chain, judged one by one: what the dynamic program is checked against.

Nothing here is taken from the solvers. Two judges say what a schedule needs:

`by_replay` is the replay, less the outputs. `by_charges` is the same timeline with simpler charges,
each at least as high, under which the least time is a function of the memory left alone:
  - the outputs are held all the while, and what a discarding run makes of them is held twice;
  - a new target is held until the backward of its maker (or of the checkpoint that made it) begins,
    even where its last reader is done before; but nobody keeps that of the last part of a redo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence

Body = tuple[Run | Checkpoint, ...]


class Judged(NamedTuple):
    """What a schedule needs, under any choice of its discarding strategies.

    Attributes:
        peak_bytes, seconds: of everything but the discarding runs.
        discards: of each discarding run, the step and what is held before it. They do not
            influence each other, so within a budget each takes the fastest strategy that fits.
    """

    peak_bytes: int
    seconds: float
    discards: tuple[tuple[int, int], ...]


Judge = Callable[[Sequence, CostTable], Judged]


def schedules(table: CostTable, max_depth: int | None = None) -> Iterator[Sequence]:
    """Every schedule whose checkpoints lie inside one group or cover whole groups, each nested
    strictly inside the next; the strategies of its discarding runs are arbitrary.
    """
    starts = {group.start for group in table.groups}
    stops = {group.stop for group in table.groups}
    group_of = {step: number for number, group in enumerate(table.groups) for step in group}

    def may_enclose(start: int, stop: int) -> bool:
        return group_of[start] == group_of[stop - 1] or (start in starts and stop in stops)

    @cache
    def bodies(at: int, body: range, redo: bool, depth: int) -> list[Body]:
        """All ways through the rest of `body`, from step `at`."""
        if at == body.stop:
            return [()]
        rest = bodies(at + 1, body, redo, depth)
        found: list[Body] = [(Run(at, cost.strategy), *tail) for cost in table.options[at] for tail in rest]
        for stop in range(at + 1, body.stop + 1) if depth else ():
            inside = range(at, stop)
            if not may_enclose(at, stop) or (redo and inside == body):
                continue
            discard = tuple(table.options[step][0].strategy for step in inside)
            rest = bodies(stop, body, redo, depth)
            for inner in bodies(at, inside, True, depth - 1):
                part = Checkpoint(Sequence(inner), discard)
                found += [(part, *tail) for tail in rest]
        return found

    steps = range(len(table.options))
    yield from map(Sequence, bodies(0, steps, False, len(steps) if max_depth is None else max_depth))


def by_replay(schedule: Sequence, table: CostTable) -> Judged:
    """What the replay says, less the outputs."""
    played = replay(schedule, table)
    peaks, discards, seconds = [0], [], 0.0
    for moment in played.moments:
        if moment.step is not None and moment.phase in ("discard", "redo discard"):
            discards.append((moment.step, moment.held_bytes - played.output_bytes))
        else:
            peaks.append(moment.peak_bytes - played.output_bytes)
            seconds += moment.seconds
    return Judged(max(peaks), seconds, tuple(discards))


def by_charges(schedule: Sequence, table: CostTable) -> Judged:
    """What the simpler charges say; see above."""
    costs = [{cost.strategy: cost for cost in options} for options in table.options]
    last = {name: step for step, names in enumerate(table.makes) for name in names}
    peaks, discards, seconds = [0], [], 0.0
    gradient_bytes = sum(table.state_bytes.values())  # every tensor of these chains is an output

    def size(names: Iterable[str]) -> int:
        return sum(table.state_bytes[name] for name in names)

    def outputs(step: int) -> list[str]:
        return [name for name in table.makes[step] if last[name] == step]

    def made(span: range) -> dict[str, int]:
        return {name: step for step in span for name in table.makes[step]}

    def first_pass(span: range, held: int) -> None:
        for step in span:
            discards.append((step, held + size(made(range(span.start, step)))))

    def body(parts: Body, held: int, redo: bool) -> int:
        """Charge a sequence that starts with `held`; returns what is held after its forward."""
        nonlocal seconds
        gradients = gradient_bytes if redo else 0
        for number, part in enumerate(parts):
            ends = redo and number == len(parts) - 1
            if isinstance(part, Checkpoint):
                if not ends:
                    first_pass(part.span, held + gradients)
                body(part.body.parts, held, True)
                exits = made(part.span) if not ends else {}
                held += size(name for name, step in exits.items() if redo or last[name] != step)
                continue
            cost = costs[part.step][part.strategy]
            output = 0 if redo else size(outputs(part.step))
            peaks.append(held + cost.backward(in_graph=not redo).bytes)
            seconds += cost.backward_seconds
            run = cost.ending if ends else cost.forward
            if run is not None:
                peaks.append(held + gradients + run.bytes - output)
                seconds += run.seconds
                held += cost.preserved_bytes + size(table.makes[part.step]) - output
        return held

    peaks.append(body(schedule.parts, 0, False) + table.loss_bytes)
    return Judged(max(peaks), seconds, tuple(discards))


def least_seconds(
    table: CostTable, units: int, judge: Judge, max_depth: int | None = None
) -> NDArray[np.float64]:
    """Least seconds of any schedule, by budget from 0 to `units` bytes; inf where none fits."""

    @cache
    def discarding(step: int, held: int) -> NDArray[np.float64]:
        times = np.full(units + 1, np.inf)
        for cost in table.options[step]:
            fits = times[max(0, held + cost.discard_bytes) :]
            np.minimum(fits, cost.discard_seconds, out=fits)
        return times

    fastest: dict[tuple, float] = {}
    for schedule in schedules(table, max_depth):
        peak, seconds, discards = judge(schedule, table)
        key = peak, tuple(sorted(discards))
        fastest[key] = min(seconds, fastest.get(key, np.inf))
    best = np.full(units + 1, np.inf)
    for (peak, discards), seconds in fastest.items():
        times = np.full(units + 1, np.inf)
        times[peak:] = seconds
        for step, held in discards:
            times += discarding(step, held)
        np.minimum(best, times, out=best)
    return best
