"""The schedule: an expression over the steps of a chain.

    Schedule = Run(step, strategy) | Sequence(parts) | Checkpoint(body, discard)

Everything else interprets it: the replay costs it, the executor runs it, the report prints it. What a part of
the first pass keeps may wait in host memory until its backward (`planner.schedules.offload`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from evoplan.model.running.kernels import is_opaque
from evoplan.model.running.strategy import Strategy

RECORD = "record"  # among what waits: what a run keeps besides the state


@dataclass(frozen=True)
class Run:
    """One step, kept for backward as its strategy keeps it.

    Attributes:
        away: state tensors that lie in host memory while it runs; only in inference (see
            `planner.schedules.waiting`).
        wait: what leaves the device after its forward and is back for its backward: state tensors by name,
            and RECORD; only on the first pass of a training step (see `planner.schedules.offload`).
    """

    step: int
    strategy: Strategy
    away: tuple[str, ...] = ()
    wait: tuple[str, ...] = ()

    @property
    def span(self) -> range:
        """The steps covered."""
        return range(self.step, self.step + 1)


@dataclass(frozen=True)
class Checkpoint:
    """Steps run twice: first discarding everything but the state at the exit, then by `body`, in backward.

    Attributes:
        body: how they run the second time.
        discard: each step's strategy the first time.
        wait: as a run's; there is no record.
    """

    body: Sequence
    discard: tuple[Strategy, ...]
    wait: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.discard) != len(self.body.span):
            raise ValueError(
                f"a checkpoint of {len(self.body.span)} steps has {len(self.discard)} strategies"
            )
        if any(isinstance(part, Run) and part.away for part in self.body.parts):
            raise ValueError("state may wait in host memory in inference only, not in a checkpoint")
        if any(part.wait for part in self.body.parts):
            raise ValueError("what a redo keeps does not wait in host memory, only what the first pass keeps")

    @property
    def span(self) -> range:
        """The steps covered."""
        return self.body.span

    def first_pass(self) -> Iterator[Run]:
        """The discarding pass."""
        return map(Run, self.span, self.discard)


@dataclass(frozen=True)
class Sequence:
    """Parts one after the other, covering consecutive steps."""

    parts: tuple[Run | Checkpoint, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a sequence needs at least one part")
        for before, after in zip(self.parts, self.parts[1:], strict=False):
            if before.span.stop != after.span.start:
                raise ValueError(f"step {before.span.stop} is missing or out of order in the schedule")

    @cached_property  # asked for again at every level above
    def span(self) -> range:
        """The steps covered."""
        return range(self.parts[0].span.start, self.parts[-1].span.stop)


Schedule = Sequence


def allow_depth(groups: int) -> None:
    """Let Python recurse as deep as checkpoints over so many groups may nest; functions of schedules do."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 8 * groups))


def depth(schedule: Sequence) -> int:
    """How many checkpoints lie within one another at most."""
    return max((1 + depth(part.body) if isinstance(part, Checkpoint) else 0) for part in schedule.parts)


def all_runs(schedule: Sequence) -> list[Run]:
    """Every step once, as its first pass runs it."""
    runs: list[Run] = []
    for part in schedule.parts:
        runs += part.first_pass() if isinstance(part, Checkpoint) else [part]
    return runs


def final_strategies(schedule: Sequence) -> dict[int, Strategy]:
    """The strategy of each step's last run, the one that backward uses."""
    strategies: dict[int, Strategy] = {}
    for part in schedule.parts:
        if isinstance(part, Checkpoint):
            strategies |= final_strategies(part.body)
        else:
            strategies[part.step] = part.strategy
    return strategies


def strategies_used(schedule: Sequence) -> dict[int, set[Strategy]]:
    """Every strategy under which each step runs in some pass."""
    used: dict[int, set[Strategy]] = {}
    for part in schedule.parts:
        inner = strategies_used(part.body) if isinstance(part, Checkpoint) else {}
        runs = part.first_pass() if isinstance(part, Checkpoint) else [part]
        for step, strategies in inner.items():
            used.setdefault(step, set()).update(strategies)
        for run in runs:
            used.setdefault(run.step, set()).add(run.strategy)
    return used


def forward_runs(schedule: Sequence) -> Counter[int]:
    """How often each step's forward runs in one training step, first and repeated passes together."""
    counts: Counter[int] = Counter()
    _count(schedule, counts, redo=False)
    return counts


def _count(body: Sequence, counts: Counter[int], redo: bool) -> None:
    for part in body.parts:
        if isinstance(part, Checkpoint):
            if not (redo and part is body.parts[-1]):
                counts.update(part.span)
            _count(part.body, counts, redo=True)
        elif needs_forward(part, body, redo):
            counts[part.step] += 1


def needs_forward(part: Run | Checkpoint, body: Sequence, redo: bool) -> bool:
    """Whether a part's forward has to run when `body` does.

    On a redo nobody reads the last state, so a last part that keeps nothing but its input need
    not run before backward runs it again.
    """
    keeps_nothing = isinstance(part, Checkpoint) or part.strategy.in_pieces
    return not (ends_redo(part, body, redo) and keeps_nothing)


def ends_redo(part: Run | Checkpoint, body: Sequence, redo: bool) -> bool:
    """Whether a part is the last of a redo: of what its forward makes, nobody reads the new state."""
    return redo and part is body.parts[-1]


@dataclass(frozen=True)
class Action:
    """What happens at one step of a pass over a schedule.

    Attributes:
        enters: checkpoints that begin here and keep the state before the step.
        run: how the step runs; None: it does not, before a checkpoint that has begun here runs it.
        recorded: whether it is kept for backward.
        unread: whether nobody reads what it makes: only what its record needs is run.
        leaves: the checkpoint of which it is the last step.
    """

    step: int
    enters: tuple[Checkpoint, ...] = ()
    run: Run | None = None
    recorded: bool = False
    unread: bool = False
    leaves: Checkpoint | None = None


def actions(body: Sequence, redo: bool = False) -> Iterator[Action]:
    """A pass over a schedule, step by step: forward's, or one that runs a checkpoint's body again."""
    for part in body.parts:
        if isinstance(part, Run):
            yield Action(part.step, run=part, recorded=True, unread=ends_redo(part, body, redo))
        elif not needs_forward(part, body, redo):
            yield Action(part.span.start, enters=(part,))
        else:
            for run in part.first_pass():
                enters = (part,) if run.step == part.span.start else ()
                leaves = part if run.step == part.span.stop - 1 else None
                yield Action(run.step, enters, run, leaves=leaves)


def shape_of(schedule: Sequence) -> str:
    """The nesting in short: s a step, [..] a checkpoint, equal neighbours counted: `3xs [2xs s]`."""

    def one(part: Run | Checkpoint) -> str:
        if isinstance(part, Run):
            return "s"
        return f"[{shape_of(part.body)}]"

    runs = ((text, len(list(same))) for text, same in groupby(map(one, schedule.parts)))
    return " ".join(text if count == 1 else f"{count}x{text}" for text, count in runs)


def shortened(schedule: Sequence, steps: int) -> Sequence:
    """The schedule of the first `steps` steps: the same choices, cut off."""
    parts: list[Run | Checkpoint] = []
    for part in schedule.parts:
        if part.span.start >= steps:
            break
        if isinstance(part, Checkpoint) and part.span.stop > steps:
            body = shortened(part.body, steps)
            part = Checkpoint(body, part.discard[: len(body.span)], part.wait)
        parts.append(part)
    # After the last part nothing runs while a copy goes on.
    parts[-1] = replace(parts[-1], wait=())
    return Sequence(tuple(parts))


def opaque_kernels(schedule: Sequence) -> list[str]:
    """Kernels in it whose memory cannot be traced."""
    used = (strategies for strategies in strategies_used(schedule).values())
    return sorted({strategy.kernel for strategies in used for strategy in strategies if is_opaque(strategy)})
