"""What a plan decides for each step, laid out as the stack of blocks that it is: a table, nothing drawn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evoplan.model.running.strategy import EAGER
from evoplan.planner.schedules.offload import on_host
from evoplan.planner.schedules.schedule import (
    Checkpoint,
    Schedule,
    final_strategies,
    forward_runs,
)

_NUMBERED = re.compile(r"(.*?)\.?\b(\d+)\b\.?(.*)")


@dataclass(frozen=True)
class Cell:
    """One step.

    Attributes:
        stack, row, column: where it stands: which stack of blocks, which submodule, which block.
        strategy: of the run that backward uses, as it prints.
        kind: of that strategy, for its colour: of `model.running.kinds`, or `inside` where modules of it are
            run otherwise.
        n: pieces.
        kernel: of attention; empty where it is the formula.
        runs: of its forward in one training step.
        level: how many checkpoints it lies in.
        away: what lies in host memory on its account (`planner.schedules.offload.on_host`).
    """

    step: int
    name: str
    stack: str
    row: str
    column: int
    strategy: str
    kind: str
    n: int
    kernel: str
    runs: int
    level: int
    away: tuple[str, ...]

    @property
    def words(self) -> str:
        """All of it, for people."""
        again = f"; forward runs {self.runs} times" if self.runs > 1 else ""
        inside = f"; in {self.level} checkpoint{'s' * (self.level > 1)}" if self.level else "; kept"
        away = f"; on the host: {', '.join(self.away)}" if self.away else ""
        return f"{self.name}: {self.strategy}{inside}{again}{away}"


@dataclass(frozen=True)
class Bracket:
    """A checkpoint: its steps (from first to last, both included), and how many it lies in."""

    first: int
    last: int
    level: int
    words: str


@dataclass(frozen=True)
class Decisions:
    """The stack: every step once, in order, and the checkpoints, the outer before the inner ones."""

    cells: tuple[Cell, ...]
    brackets: tuple[Bracket, ...]

    @property
    def stacks(self) -> list[str]:
        """Stacks of blocks, in order."""
        return list(dict.fromkeys(cell.stack for cell in self.cells))


def decisions(schedule: Schedule, names: Sequence[str], training: bool = True) -> Decisions:
    """What a schedule does with each step.

    Args:
        names: of the steps, such as `blocks.3.row_attention`.
    """
    final, runs = final_strategies(schedule), forward_runs(schedule)
    brackets = tuple(_brackets(schedule, names, 0))
    levels = Counter(step for one in brackets for step in range(one.first, one.last + 1))
    away = on_host(schedule)
    cells = []
    for step, place in enumerate(_places(names)):
        strategy = final[step]
        cells.append(
            Cell(
                step,
                names[step],
                *place,
                strategy=str(strategy),
                kind="inside" if strategy.within else strategy.kind,
                n=strategy.n,
                kernel="" if strategy.kernel == EAGER else strategy.kernel,
                runs=runs[step] if training else 1,
                level=levels[step],
                away=away.get(step, ()),
            )
        )
    return Decisions(tuple(cells), brackets)


def _places(names: Sequence[str]) -> list[tuple[str, str, int]]:
    """The stack, the row and the column of each step, told from its name; no two are at one place."""
    found = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        stack, block, rest = match.groups() if match else ("", "0", name)
        found.append((stack, rest or stack or "step", int(block)))
    if len(set(found)) == len(found):
        return found
    return [("", "step", step) for step in range(len(names))]


def _brackets(body: Schedule, names: Sequence[str], level: int) -> Iterator[Bracket]:
    for part in body.parts:
        if isinstance(part, Checkpoint):
            first, last = part.span.start, part.span.stop - 1
            counts = Counter(map(str, part.discard)).most_common()
            passes = ", ".join(f"{name} ({count})" for name, count in counts)
            words = f"checkpoint {level + 1} deep, {names[first]} to {names[last]}; first pass: {passes}"
            yield Bracket(first, last, level, words)
            yield from _brackets(part.body, names, level + 1)
