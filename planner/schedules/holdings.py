"""What is live at each moment of a schedule, and whose it is: the replay, watched.

The replay knows how much is live. Here every tensor of it has a name and a time: versions of the state, what
recorded steps preserve, gradients of the state. What a moment needs besides is its workspace. The four add up
to the moment's peak, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Literal, NamedTuple

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import INPUT, Version
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.replay import Machine, Phase, Record, Replay, checked
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Sequence, final_strategies, needs_forward
from evoplan.planner.schedules.waiting import moves

Kind = Literal["state", "preserved", "gradients"]
KINDS: tuple[Kind, ...] = ("state", "preserved", "gradients")
_NO_RUN = ("loss", "to host", "from host")


class Pass(NamedTuple):
    """A run of a step in one pass or another.

    Attributes:
        level: how many checkpoints it lies in that are being redone.
        end: the step after the last of that redo, or of the chain; after a backward's own step.
    """

    strategy: Strategy
    level: int
    end: int


@dataclass(frozen=True)
class Held:
    """One tensor (or all that one step preserves), and the moments at which it is live.

    Attributes:
        kind: whose it is.
        name: the state tensor that it is, or whose gradient it is; None for what a step preserves.
        step: that made it; the gradient's is the step that made its tensor, INPUT for the chain's inputs.
        first, last: moments, both included; `last` is one past the last moment where it outlives the step.
            What a moment itself makes is its workspace until it ends.
    """

    kind: Kind
    name: str | None
    step: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Holdings:
    """A replay with what it is made of. Bytes are above what is static, as the replay's.

    Attributes:
        held: in order of their first moments.
        workspace: of each moment, in bytes: what its run makes besides.
        passes: of each moment, which run it is; None for the loss and for copies.
    """

    replay: Replay
    held: tuple[Held, ...]
    workspace: tuple[int, ...]
    passes: tuple[Pass | None, ...]

    @cached_property
    def parts(self) -> tuple[dict[str, int], ...]:
        """Of each moment, bytes by kind and of its workspace; their sum is the moment's peak."""
        changes: list[dict[str, int]] = [dict.fromkeys(KINDS, 0) for _ in range(len(self.workspace) + 2)]
        for one in self.held:
            changes[one.first][one.kind] += one.bytes
            changes[one.last + 1][one.kind] -= one.bytes
        now: dict[str, int] = dict.fromkeys(KINDS, 0)
        found: list[dict[str, int]] = []
        for change, work in zip(changes, self.workspace, strict=False):
            for kind in KINDS:
                now[kind] += change[kind]
            found.append({**now, "workspace": work})
        return tuple(found)

    def live(self, moment: int) -> Iterator[Held]:
        """What is held during a moment."""
        return (one for one in self.held if one.first <= moment <= one.last)


def holdings(schedule: Sequence, table: CostTable) -> Holdings:
    """Replay a schedule and note what is live when.

    Raises:
        ValueError: as `replay`.
    """
    watched = _Watched(table)
    away = [names for _, *both in moves(schedule) for names in both if names]
    watched.moved = iter(away if not table.training else ())
    result = watched.run(checked(schedule, table))
    watched.finish()
    preserved = list(_preserved(result, schedule, table, watched.elsewhere))
    return _complete(result, schedule, table, [*watched.states, *preserved])


@dataclass
class _Watched(Machine):
    """A machine whose state tensors leave a note when they go.

    Attributes:
        born: first moment of each version that is on the device.
        elsewhere: of steps whose records wait, the first moment without and the first with them again.
        moved: names of what each copy between the device and the host moves, in order.
    """

    born: dict[Version, int] = field(default_factory=dict)
    states: list[Held] = field(default_factory=list)
    makers: list[int] = field(default_factory=list)
    moved: Iterator[tuple[str, ...]] = field(default_factory=lambda: iter(()))
    elsewhere: dict[int, tuple[int, int]] = field(default_factory=dict)

    def moment(self, phase: Phase, step: int | None, extra_bytes: int, seconds: float) -> None:
        super().moment(phase, step, extra_bytes, seconds)
        self.makers.append(INPUT if step is None else step)
        if phase in ("to host", "from host") and not self.table.training:
            names = next(self.moved)
            for version in [v for v, count in self.holders.items() if count and v.tensor in names]:
                if phase == "to host":
                    self._gone(version)
                else:
                    self.born[version] = len(self.moments)

    def keep(self, versions: Iterable[Version]) -> None:
        versions = list(versions)
        new = [v for v in versions if not self.holders[v] and self.table.liveness.owns(v)]
        super().keep(versions)
        for version in new:
            self.born.setdefault(version, len(self.moments))

    def release(self, versions: Iterable[Version]) -> None:
        versions = list(versions)
        super().release(versions)
        for version in versions:
            if not self.holders[version] and version in self.born:
                self._gone(version)

    def put_away(self, record: Record) -> None:
        super().put_away(record)
        for version in record.waits:
            self._gone(version)
        if RECORD in record.part.wait:
            self.elsewhere[record.part.span.start] = len(self.moments), len(self.moments)

    def take_back(self, record: Record) -> None:
        super().take_back(record)
        now = len(self.moments)
        self.born |= dict.fromkeys(record.waits, now)
        if RECORD in record.part.wait:
            step = record.part.span.start
            self.elsewhere[step] = self.elsewhere[step][0], now

    def finish(self) -> None:
        """Note what is there at the end."""
        for version in list(self.born):
            self._gone(version, len(self.moments))

    def _gone(self, version: Version, last: int | None = None) -> None:
        """Note a version whose last moment has been."""
        first, last = self.born.pop(version), len(self.moments) - 1 if last is None else last
        if first <= last:
            size = self.table.state_bytes[version.tensor]
            # Versions count moments from 1.
            maker = INPUT if version.maker == INPUT else self.makers[version.maker - 1]
            self.states.append(Held("state", version.tensor, maker, size, first, last))


def _complete(result: Replay, schedule: Sequence, table: CostTable, kept: list[Held]) -> Holdings:
    """What gradients there are follows from the moments."""
    taken = [0] * (len(result.moments) + 2)
    for one in kept:
        taken[one.first] += one.bytes
        taken[one.last + 1] -= one.bytes
    peaks = (moment.peak_bytes for moment in result.moments)
    room = [peak - held for peak, held in zip(peaks, accumulate(taken), strict=False)]
    passes = _passes(schedule, table, result)
    live = list(_live_gradients(result, passes, table))
    gradients: list[Held] = []
    open_: dict[Version, int] = {}
    for at, versions in enumerate([*live, ()]):
        # Where not all of the state has a gradient, the moment's own cost tells less than that of all.
        fits = at < len(live) and sum(table.state_bytes[v.tensor] for v in versions) <= room[at]
        now = dict.fromkeys(versions if fits else ())
        for version in [v for v in open_ if v not in now]:
            size = table.state_bytes[version.tensor]
            begun = open_.pop(version)
            gradients.append(Held("gradients", version.tensor, version.maker, size, begun, at - 1))
        for version in now:
            open_.setdefault(version, at)
            room[at] -= table.state_bytes[version.tensor]
    held = sorted((*kept, *gradients), key=lambda one: (one.first, one.last, one.kind))
    return Holdings(result, tuple(held), tuple(room), tuple(passes))


def _preserved(
    result: Replay, schedule: Sequence, table: CostTable, elsewhere: Mapping[int, tuple[int, int]]
) -> Iterator[Held]:
    """Of each step, what its recorded run keeps, until its backward has run; but not where that waits."""
    final, begun = final_strategies(schedule), {}
    for at, moment in enumerate(result.moments):
        if moment.step is None:
            continue
        if moment.phase in ("forward", "redo"):
            begun[moment.step] = at + 1
        elif moment.phase == "backward":
            (cost,) = (c for c in table.options[moment.step] if c.strategy == final[moment.step])
            # What has no forward of its own on a redo keeps what its backward makes.
            if moment.step in begun and cost.preserved_bytes:
                first, size = begun[moment.step], cost.preserved_bytes
                if moment.step in elsewhere:
                    gone, back = elsewhere[moment.step]
                    yield Held("preserved", None, moment.step, size, first, gone - 1)
                    first = back
                yield Held("preserved", None, moment.step, size, first, at)


def _passes(schedule: Sequence, table: CostTable, result: Replay) -> list[Pass | None]:
    """Of each moment the run that it is; None for the loss and for copies."""
    runs = _forward(schedule, False, 0)
    if table.training:
        runs = chain(runs, _backward(schedule, 0))
    return [None if moment.phase in _NO_RUN else next(runs) for moment in result.moments]


def _forward(body: Sequence, redo: bool, level: int) -> Iterator[Pass]:
    for part in body.parts:
        if needs_forward(part, body, redo):
            runs = part.first_pass() if isinstance(part, Checkpoint) else (part,)
            yield from (Pass(run.strategy, level, body.span.stop) for run in runs)


def _backward(body: Sequence, level: int) -> Iterator[Pass]:
    for part in reversed(body.parts):
        if isinstance(part, Checkpoint):
            yield from _forward(part.body, True, level + 1)
            yield from _backward(part.body, level + 1)
        else:
            yield Pass(part.strategy, level, part.span.stop)


def _live_gradients(
    result: Replay, passes: list[Pass | None], table: CostTable
) -> Iterator[tuple[Version, ...]]:
    """Of each moment, the versions of the state that have a gradient."""
    for moment, run in zip(result.moments, passes, strict=True):
        if moment.phase == "loss":
            yield table.liveness.outputs
        elif run is not None and moment.phase in ("redo", "redo discard", "backward"):
            yield table.liveness.alive(run.end)
        else:
            yield ()
