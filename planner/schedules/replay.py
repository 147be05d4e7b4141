"""The simulator of schedules: one replay of an expression judges its memory and time, for every solver.

It moves through the same phases as the executor and counts what is held: versions of the state
(once, however many hold them), what recorded steps preserve, gradients, outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import Version
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.offload import check_host, last_read, record_bytes, waits
from evoplan.planner.schedules.schedule import (
    RECORD,
    Checkpoint,
    Run,
    Sequence,
    ends_redo,
    needs_forward,
)
from evoplan.planner.schedules.waiting import moves

Phase = Literal["forward", "discard", "loss", "redo", "redo discard", "backward", "to host", "from host"]


@dataclass(frozen=True)
class Moment:
    """One run of one step (or of the loss), or a copy between the device and the host.

    In inference a copy goes before its step. In training it goes beside the steps of a part, and the moment
    after the part's last one is the rest of it, of which the device waits for the end.

    Attributes:
        phase, step: what runs; step is None for the loss, and for copies after the last step.
        held_bytes: live before it starts, inputs excluded unless they are the chain's own.
        peak_bytes: most that is live during it.
        seconds: its predicted time.
    """

    phase: Phase
    step: int | None
    held_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Replay:
    """What a schedule costs. Bytes are above the model's parameters, gradients, optimizer and inputs that are
    not the chain's own.

    Attributes:
        moments: everything that runs, in order.
        output_bytes: the new state, which outlives the chain.
        host_bytes: most that waits in host memory between forward and backward.
    """

    moments: tuple[Moment, ...]
    output_bytes: int
    host_bytes: int = 0

    @cached_property
    def peak(self) -> Moment:
        """The moment at which the most is live."""
        return max(self.moments, key=lambda moment: moment.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that is live at any moment."""
        return self.peak.peak_bytes

    @property
    def seconds(self) -> float:
        """Time of one step."""
        return sum(moment.seconds for moment in self.moments)


def replay(schedule: Sequence, table: CostTable) -> Replay:
    """Run a schedule on the cost table.

    Raises:
        ValueError: the schedule covers other steps than the table, uses a strategy that it lacks, or has
            state in host memory where that cannot be.
    """
    return Machine(table).run(checked(schedule, table))


def checked(schedule: Sequence, table: CostTable) -> Sequence:
    """The schedule, if the table has what it needs; ValueError as `replay` has it, strategies aside."""
    steps = range(len(table.options))
    if schedule.span != steps:
        raise ValueError(f"the schedule covers steps {schedule.span}, the chain has {steps}")
    check_host(schedule, table)
    return schedule


@dataclass
class Record:
    """What one part holds between its forward and its backward.

    Attributes:
        bytes: beside state, on the device.
        own: of what it made.
        waits: of the state, what waits in host memory.
    """

    part: Run | Checkpoint
    entry: tuple[Version, ...]
    bytes: int = 0
    own: tuple[Version, ...] = ()
    waits: tuple[Version, ...] = ()


@dataclass
class Machine:
    """What runs a schedule on a cost table; `planner.schedules.holdings` watches one at it.

    The state is a version of each tensor that is still needed; runs make versions of their own.

    A tensor made again on a redo is another tensor, so makers are counted through: the n-th run's.
    """

    table: CostTable
    held_bytes: int = 0
    moments: list[Moment] = field(default_factory=list)
    holders: Counter[Version] = field(default_factory=Counter)
    costs: list[dict[Strategy, StepCost]] = field(init=False)

    def __post_init__(self) -> None:
        options = self.table.options
        distinct = {id(costs): {cost.strategy: cost for cost in costs} for costs in options}
        self.costs = [distinct[id(costs)] for costs in options]

    def run(self, schedule: Sequence) -> Replay:
        table = self.table
        state = {version.tensor: version for version in table.liveness.alive(0)}
        self.keep(state.values())
        if not table.training:
            self.infer(schedule, state)
            return Replay(tuple(self.moments), table.bytes_of(state.values()))
        records: list[Record] = []
        self.forward(schedule, state, records, redo=False)
        host_bytes = sum(map(self.waiting_bytes, records))
        self.moment("loss", None, table.loss_bytes, 0.0)
        while records:
            begun = len(self.moments)
            before = records[-2] if len(records) > 1 else None
            if before is not None:
                self.take_back(before)
            self.backward(records, in_graph=not waits(schedule))
            if before is not None:
                self.copied("from host", before, begun)
        return Replay(tuple(self.moments), table.bytes_of(state.values()), host_bytes)

    def cost(self, run: Run) -> StepCost:
        try:
            return self.costs[run.step][run.strategy]
        except KeyError:
            raise ValueError(f"step {run.step} has no cost for strategy {run.strategy}") from None

    def moment(self, phase: Phase, step: int | None, extra_bytes: int, seconds: float) -> None:
        self.moments.append(Moment(phase, step, self.held_bytes, self.held_bytes + extra_bytes, seconds))

    def keep(self, versions: Iterable[Version]) -> None:
        for version in versions:
            self.holders[version] += 1
            if self.holders[version] == 1 and self.table.liveness.owns(version):
                self.held_bytes += self.table.state_bytes[version.tensor]

    def release(self, versions: Iterable[Version]) -> None:
        for version in versions:
            self.holders[version] -= 1
            if self.holders[version] == 0 and self.table.liveness.owns(version):
                self.held_bytes -= self.table.state_bytes[version.tensor]

    def advance(
        self, state: dict[str, Version], step: int, keeps: Iterable[int] = (), record: Record | None = None
    ) -> None:
        """What the step makes takes the place of what was there; what nobody reads any longer goes.

        Args:
            keeps: which of what it makes the record holds as well.
        """
        makes = self.table.makes[step]
        fresh = {name: Version(name, len(self.moments)) for name in makes}
        self.keep(fresh.values())
        if record is not None:
            record.own = tuple(fresh[makes[at]] for at in keeps)
            self.keep(record.own)
        self.release(state[name] for name in fresh if name in state)
        state |= fresh
        self.release(state.pop(name) for name in self.table.liveness.last_reads(step))

    def infer(self, schedule: Sequence, state: dict[str, Version]) -> None:
        for run, put, take in moves(schedule):
            step = None if run is None else run.step
            copies: list[tuple[Phase, Iterable[str], int]] = [("to host", put, -1), ("from host", take, 1)]
            for phase, names, sign in copies:
                if names:
                    assert self.table.host_bandwidth is not None  # as `replay` has seen to
                    moved = sum(self.table.state_bytes[name] for name in names)
                    seconds = moved / self.table.host_bandwidth
                    self.moment(phase, step, max(0, sign * moved), seconds)
                    self.held_bytes += sign * moved
            self.discard([run] if run else [], state, "discard")

    def discard(self, runs: Iterable[Run], state: dict[str, Version], phase: Phase) -> None:
        for run in runs:
            cost = self.cost(run)
            self.moment(phase, run.step, cost.discard_bytes, cost.discard_seconds)
            self.advance(state, run.step)

    def forward(self, body: Sequence, state: dict[str, Version], records: list[Record], redo: bool) -> None:
        """Run `body` from a state that is the caller's, leaving a record of each part."""
        live_gradients = self.table.gradient_bytes(body.span.stop) if redo else 0
        for number, part in enumerate(body.parts):
            begun, entry = len(self.moments), self.table.liveness.entry(part.span)
            record = Record(part, tuple(state[version.tensor] for version in entry))
            if part.wait:
                may = last_read(self.table.liveness, part.span)
                record.waits = tuple(state[version.tensor] for version in may if version.tensor in part.wait)
            self.keep(record.entry)
            records.append(record)
            if not needs_forward(part, body, redo):
                continue
            self.held_bytes += live_gradients
            if isinstance(part, Checkpoint):
                self.discard(part.first_pass(), state, "redo discard" if redo else "discard")
            else:
                cost = self.cost(part)
                run = cost.ending if ends_redo(part, body, redo) else cost.forward
                assert run is not None  # of what needs a forward
                self.moment("redo" if redo else "forward", part.step, run.bytes, run.seconds)
                record.bytes = cost.preserved_bytes
                self.held_bytes += record.bytes
                self.advance(state, part.step, cost.keeps_made, record)
            self.held_bytes -= live_gradients
            if number and not redo:
                self.copied("to host", records[-2], begun)
                self.put_away(records[-2])

    # What waits in host memory: `planner.schedules.offload` says when it moves.

    def waiting_bytes(self, record: Record) -> int:
        """How much of a record waits."""
        more = 0
        if RECORD in record.part.wait:
            assert isinstance(record.part, Run)
            more = record_bytes(self.cost(record.part))
        return more + self.table.bytes_of(record.waits)

    def copied(self, phase: Phase, record: Record, begun: int) -> None:
        """A copy that has gone on since a moment is waited for."""
        size, bandwidth = self.waiting_bytes(record), self.table.host_bandwidth
        if size and bandwidth is not None:
            beside = sum(moment.seconds for moment in self.moments[begun:])
            self.moment(phase, self.moments[-1].step, 0, max(0.0, size / bandwidth - beside))

    def put_away(self, record: Record) -> None:
        """What waits of a record is not on the device any longer."""
        self.held_bytes -= self.waiting_bytes(record)

    def take_back(self, record: Record) -> None:
        """There is room for it again, into which it is copied."""
        self.held_bytes += self.waiting_bytes(record)

    def backward(self, records: list[Record], in_graph: bool = False) -> None:
        """The last record is differentiated.

        Args:
            in_graph: it is of the first pass, and autograd may have it in its own graph.
        """
        record = records.pop()
        if isinstance(record.part, Checkpoint):
            inner: list[Record] = []
            state = {version.tensor: version for version in record.entry}
            self.keep(state.values())
            self.forward(record.part.body, state, inner, redo=True)
            self.release(state.values())
            self.release(record.entry)
            while inner:
                self.backward(inner)
            return
        cost = self.cost(record.part)
        self.held_bytes -= record.bytes  # what backward takes counts it
        self.release(record.own)
        held = [version for version in record.own if self.holders[version]]
        size, held_size = cost.backward(in_graph)
        if held:
            more = self.table.bytes_of(version for version in record.own if version not in held)
            size = max(size, held_size + more)
        self.moment("backward", record.part.step, size, cost.backward_seconds)
        self.release(record.entry)
