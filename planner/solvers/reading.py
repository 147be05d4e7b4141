"""Reading a schedule off the tables of the dynamic program: the same choices, compared at one point."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.solvers.dp import Depth, Program
from evoplan.planner.solvers.grid import FIRST, Pass, Times
from evoplan.planner.solvers.segments import Segments
from evoplan.planner.solvers.ways import Way

Parts = list[Run | Checkpoint]

KEPT_WAYS = 128  # ways through a group that are kept: neighbouring budgets ask for the same ones


@dataclass
class Reader:
    """Schedules of one program whose costs are not rounded down."""

    program: Program
    _ways: dict[Hashable, list[Times]] = field(default_factory=dict, repr=False)

    def schedule(self, memory: int) -> Sequence:
        """The fastest schedule within `memory` grid units, where the program's `times` are finite."""
        parts: Parts = []
        program, group = self.program, 0
        while group < len(program.table.groups):
            segments, after = program.first_segments(group), program.first_of(group + 1)
            group, memory = self._take(parts, group, memory, after, segments, FIRST, program.max_depth)
        return Sequence(tuple(parts))

    def checkpoint(self, steps: range, memory: int) -> Checkpoint:
        """The best one on the first pass, over some steps of one group or over whole groups."""
        groups, depth = self.program.table.groups, self.program.max_depth
        group = next(number for number, own in enumerate(groups) if steps.start in own)
        own = groups[group]
        if steps.stop <= own.stop:
            return self._inside(group, steps.start - own.start, steps.stop - own.start, memory, FIRST, depth)
        end = next(number for number, other in enumerate(groups) if other.stop == steps.stop) + 1
        return self._over_groups(group, end, memory, FIRST, depth)

    def _redo_body(self, group: int, end: int, memory: int, depth: Depth) -> Sequence:
        parts: Parts = []
        program = self.program
        while group < end - 1:
            segments, after = program.redo_segments(group, end, depth), program.redo_of(group + 1, end, depth)
            which = program.redo_pass(end - 1, len(program.table.groups[end - 1]))
            group, memory = self._take(parts, group, memory, after, segments, which, depth)
        if group < end:
            self._walk_redo(parts, group, 0, len(program.table.groups[group]), memory, depth)
        return Sequence(tuple(parts))

    def _take(
        self,
        parts: Parts,
        group: int,
        memory: int,
        after: Times,
        segments: Segments | None,
        which: Pass,
        depth: Depth,
    ) -> tuple[int, int]:
        """Append the best way on from a group; returns the next group and the memory left there."""
        ways = self.program.ways(group, which, depth)
        times = self._through(group, after if ways is None else after[: ways.enough], which, depth)
        way, low = None, memory
        if ways is not None and memory >= ways.enough:
            way, low = ways.best(memory, after), ways.enough - 1
            if times[0][low] < way.at(memory, after):  # as fast with less memory, rounded otherwise
                way = None
        seconds = times[0][low] if way is None else way.at(memory, after)
        if segments is not None:
            spans = segments.at(memory)
            best = int(spans.argmin())
            if spans[best] < seconds:
                parts.append(self._over_groups(group, segments.ends[best], memory, which, depth))
                return segments.ends[best], memory - int(segments.kept[best])
        if way is not None:
            self._follow(parts, group, way, memory, which, depth)
            return group + 1, memory - way.kept
        size = len(self.program.table.groups[group])
        return group + 1, self._walk(parts, group, 0, size, low, times, which, False, depth)

    def _follow(self, parts: Parts, group: int, way: Way, memory: int, which: Pass, depth: Depth) -> None:
        """Append a way through a whole group, which has enough memory."""
        steps, at, kept = self.program.table.groups[group], 0, 0
        for part in way.parts:
            if part.strategy is not None:
                parts.append(Run(steps[at], part.strategy))
            else:
                left = memory - self.program.costs.units(kept)
                parts.append(self._inside(group, at, part.stop, left, which, depth))
            at, kept = part.stop, kept + part.preserved

    def _over_groups(self, group: int, end: int, memory: int, which: Pass, depth: Depth) -> Checkpoint:
        """The best checkpoint over whole groups."""
        body = self._redo_body(group, end, memory, self.program.below(depth))
        return Checkpoint(body, self.program.costs.discard_strategies(body.span, memory, which))

    def _inside(
        self, group: int, start: int, stop: int, memory: int, which: Pass, depth: Depth
    ) -> Checkpoint:
        """The best checkpoint over some steps of a group."""
        body: Parts = []
        self._walk_redo(body, group, start, stop, memory, self.program.below(depth))
        steps = self.program.table.groups[group][start:stop]
        return Checkpoint(Sequence(tuple(body)), self.program.costs.discard_strategies(steps, memory, which))

    def _through(self, group: int, after: Times, which: Pass, depth: Depth) -> list[Times]:
        """`Program.through` for a whole group."""
        program = self.program
        outputs = () if which.redo else program.costs.outputs_of(group)
        address = after.__array_interface__["data"][0]  # `after` is a row of a table, which stays where it is
        key = program.costs.kinds[group], address, which, depth, outputs
        if key not in self._ways:
            if len(self._ways) == KEPT_WAYS:
                del self._ways[next(iter(self._ways))]
            size = len(program.table.groups[group])
            self._ways[key] = program.through(group, size, after, which, False, depth)
        return self._ways[key]

    def _walk_redo(self, parts: Parts, group: int, at: int, stop: int, memory: int, depth: Depth) -> None:
        """Append the best redo of steps of one group."""
        times, which = self.program.inside(group, stop, depth), self.program.redo_pass(group, stop)
        self._walk(parts, group, at, stop, memory, times, which, True, depth)

    def _walk(
        self,
        parts: Parts,
        group: int,
        at: int,
        stop: int,
        memory: int,
        times: list[Times],
        which: Pass,
        ends: bool,
        depth: Depth,
    ) -> int:
        """Append the best way through the steps of one group; returns the memory left after them."""
        program, steps = self.program, self.program.table.groups[group]
        while at < stop:
            choices = program.choices(group, at, stop, which, ends, depth)
            best = min(choices, key=lambda choice: choice.at(memory, times[choice.stop]))
            if best.strategy is not None:
                parts.append(Run(steps[at], best.strategy))
            else:
                parts.append(self._inside(group, at, best.stop, memory, which, depth))
            at, memory = best.stop, memory - best.preserved
        return memory
