"""State and records that wait in host memory between forward and backward: planned with all the rest.

What a part of the first pass keeps may leave the device while the next part runs forward, and comes back
while that part is differentiated. It counts as if it stayed, up to the end of the next part's forward and
from the beginning of that part's backward on; each of these takes as long as the copy if that takes longer.
That is the class of schedules: one part is the window. In it this is exact, on a grid:

    first(i, o, M) = min over parts i..j of the first pass, and what of it waits, w
      max(forward(M - o), o / bandwidth) + max(backward(M - o), o / bandwidth)
        + first(j, w, M - kept + w)                                      needs M - o >= need

o is what the part before lets wait, M what is left once that is gone. What checkpoints run again is
`planner.solvers.dp`'s, and keeps what it keeps on the device.

Source: Beaumont et al. (2021), Efficient combination of rematerialization and offloading for training DNNs
(POFO): both chosen at once on a chain; deciding what to offload alone is strongly NP-hard there, where
windows are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evoplan.cost_model.liveness import Version
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.offload import last_read, record_bytes
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.grid import FIRST, Times
from evoplan.planner.solvers.reading import Reader


class Part(NamedTuple):
    """What the first pass may do from one step on. Memory is in units.

    Attributes:
        stop: the step after it.
        need: beside what leaves meanwhile.
        kept: held from its end on, waiting or not.
        waits: of all that is held, what leaves while the next part runs.
        forward, backward: seconds; of a checkpoint for each room.
        names: what waits.
        strategy: of a run; None: a checkpoint.
    """

    stop: int
    need: int
    kept: int
    waits: int
    forward: float | Times
    backward: float | Times
    names: tuple[str, ...] = ()
    strategy: Strategy | None = None

    def seconds(self, room: int, copy: float) -> float:
        """Of its two passes with so much room, a copy of so many seconds going on beside each."""
        both = (at if isinstance(at, float) else float(at[room]) for at in (self.forward, self.backward))
        return sum(max(own, copy) for own in both)


@dataclass
class OffloadProgram:
    """The recurrence on one grid: all budgets of up to the program's.

    Args:
        program: of the same chain without waiting; rounded down, times are lower bounds here too.
        bandwidth: bytes per second between device and host, each way.
        price: seconds that a byte in host memory is charged besides, so that fewer wait.
    """

    program: Program
    bandwidth: float
    price: float = 0.0

    def __post_init__(self) -> None:
        program = self.program
        self.costs, self.table, self.size = program.costs, program.table, program.size
        self._liveness, self._outputs = self.costs.liveness, set(self.costs.liveness.outputs)
        self._end = len(self.table.options)
        self._twice: dict[tuple[int, int, int], Times] = {}
        self.parts = [list(self._parts(step)) for step in range(self._end)]
        # By step, what the part before may let wait: least times with so much.
        self._first: list[dict[int, Times]] = [{} for _ in range(self._end + 1)]
        sizes: list[set[int]] = [{0} for _ in range(self._end + 1)]
        for part in (part for parts in self.parts for part in parts):
            sizes[part.stop].add(part.waits)
        done = np.full(self.size, np.inf)
        done[self.costs.units(self.table.loss_bytes) :] = 0.0
        self._first[self._end][0] = done
        for step in reversed(range(self._end)):
            most = max(sizes[step])
            for size in sorted(sizes[step]):
                # What waits was counted before: nobody asks for more than all there is.
                self._first[step][size] = np.pad(self._least(step, size), (0, most), mode="edge")
            self._twice.clear()

    @property
    def times(self) -> Times:
        """Least seconds of the whole chain, by budget in grid units; prices included."""
        return self._first[0][0][: self.size]

    def copy_seconds(self, units: int) -> float:
        """Of so much, one way."""
        return units * self.program.unit_bytes / self.bandwidth

    def _charge(self, part: Part) -> float:
        return part.waits * self.program.unit_bytes * self.price

    def _least(self, step: int, leaves: int) -> Times:
        """Least times from a step on, beside which so much leaves the device."""
        best, copy = np.full(self.size, np.inf), self.copy_seconds(leaves)
        for part in self.parts[step]:
            least = part.need + leaves
            if least >= self.size:
                continue
            then, freed = self._first[part.stop][part.waits], part.waits - part.kept
            times = then[least + freed : self.size + freed] + self._charge(part)
            times += self._both(part, leaves, copy)
            np.minimum(best[least:], times, out=best[least:])
        return best

    def _both(self, part: Part, leaves: int, copy: float) -> float | Times:
        """Seconds of both passes of a part where it fits, by memory."""
        if isinstance(part.forward, float) or isinstance(part.backward, float):
            return part.seconds(0, copy)
        key = id(part.forward), id(part.backward), leaves
        if key not in self._twice:
            room = slice(0, self.size - leaves)
            self._twice[key] = np.maximum(part.forward[room], copy) + np.maximum(part.backward[room], copy)
        return self._twice[key][part.need :]

    # What the first pass may do.

    def _parts(self, step: int) -> Iterator[Part]:
        """All that it may do from a step on."""
        group = next(n for n, steps in enumerate(self.table.groups) if step in steps)
        for kept, record, cost in self._runs(step):
            forward = cost.forward_bytes - self._bytes_of_outputs(step)
            need = max(self.costs.units(forward), self.costs.units(_backward(cost)), kept)
            part = Part(step + 1, need, kept, 0, cost.forward_seconds, cost.backward_seconds)
            for waits, names in self._waits(range(step, step + 1)):
                part = part._replace(waits=waits, names=names, strategy=cost.strategy)
                yield part
                if record and step + 1 < self._end:
                    yield part._replace(waits=waits + record, names=(*names, RECORD))
        for stop, forward_times, backward_times in self._checkpoints(group, step):
            kept = self.costs.exit(range(step, stop), FIRST)
            for waits, names in self._waits(range(step, stop)):
                yield Part(stop, kept, kept, waits, forward_times, backward_times, names)

    def _waits(self, steps: range) -> Iterator[tuple[int, tuple[str, ...]]]:
        """What of the state may wait after some steps: units and names."""
        may = [version for version in last_read(self._liveness, steps) if steps.stop < self._end]
        for count in range(len(may) + 1):
            for some in combinations(may, count):
                yield self.costs.state_units(some), tuple(version.tensor for version in some)

    def _bytes_of_outputs(self, step: int) -> int:
        """Of what a step makes: held in any case, and not counted."""
        made = self._liveness.made_by(step)
        return sum(self.table.state_bytes[v.tensor] for v in made if v in self._outputs)

    def _runs(self, step: int) -> Iterator[tuple[int, int, StepCost]]:
        """Recorded runs worth a try: units kept, of them what may wait besides the state, and the cost."""

        def make() -> list[tuple[int, int, StepCost]]:
            units, rows = self.costs.units, []
            for cost in self.table.options[step]:
                record = record_bytes(cost)
                kept = units(record) + units(cost.preserved_bytes - record)
                rows.append((kept + self.costs.state_units(needed), units(record), cost))
            return [row for row in rows if not any(_beats(other, row) for other in rows)]

        needed = self._needed(step)
        key = "runs", id(self.table.options[step]), tuple(version.tensor for version in needed)
        yield from self.costs.cached(key, make)

    def _needed(self, step: int) -> list[Version]:
        """Of what a step makes, what it leaves behind."""
        alive = self._liveness.alive(step + 1)
        return [v for v in self._liveness.made_by(step) if v in alive and v not in self._outputs]

    def _checkpoints(self, group: int, step: int) -> Iterator[tuple[int, Times, Times]]:
        """Where a checkpoint from a step on may end, and the times of its discarding pass and its redo."""
        program, groups = self.program, self.table.groups
        if program.max_depth == 0:
            return
        steps, depth = groups[group], program.below(program.max_depth)
        at = step - steps.start
        for end in range(at + 1, len(steps) + 1):
            discard = self.costs.discard_pass(group, at, end, frozenset(), FIRST)
            yield steps.start + end, discard, program.inside(group, end, depth)[at]
        if at == 0:
            for last in range(group + 2, len(groups) + 1):
                discard = program.over_groups.discard_pass(group, last, FIRST)
                yield groups[last - 1].stop, discard, program.redo_of(group, last, depth)

    def schedule(self, memory: int) -> Sequence:
        """The fastest schedule within so many units, where `times` are finite."""
        parts: list[Run | Checkpoint] = []
        reader, step, leaves = Reader(self.program), 0, 0
        while step < self._end:
            room, copy = memory - leaves, self.copy_seconds(leaves)

            def seconds(part: Part, room: int = room, copy: float = copy, memory: int = memory) -> float:
                if part.need > room:
                    return np.inf
                then = self._first[part.stop][part.waits]
                charge = self._charge(part) + part.seconds(room, copy)
                return float(then[memory + part.waits - part.kept]) + charge

            best = min(self.parts[step], key=seconds)
            if best.strategy is not None:
                parts.append(Run(step, best.strategy, wait=best.names))
            else:
                checkpoint = reader.checkpoint(range(step, best.stop), room)
                parts.append(Checkpoint(checkpoint.body, checkpoint.discard, best.names))
            step, memory, leaves = best.stop, memory - best.kept + best.waits, best.waits
        return Sequence(tuple(parts))


def _backward(cost: StepCost) -> int:
    """Its peak, whether the schedule turns out to have anything wait or not."""
    return max(cost.backward_bytes, cost.backward(in_graph=True).bytes)


def _beats(one: tuple[int, int, StepCost], other: tuple[int, int, StepCost]) -> bool:
    """Whether a run is as good in all, and better in something."""

    def all_of(row: tuple[int, int, StepCost]) -> tuple[float, ...]:
        kept, record, cost = row
        of_memory = cost.forward_bytes, _backward(cost), kept, kept - record, record
        return *of_memory, cost.forward_seconds, cost.backward_seconds

    pairs = list(zip(all_of(one), all_of(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
