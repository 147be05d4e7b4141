"""CP-SAT on the same problem: a second solver, and a bound that it proves.

It plans schedules with no checkpoint, or one level of them, from items: ways to run a few consecutive
steps that need so much memory, keep so much of it, and take so long. Two integer programs choose among them:

- *Short chains*: one boolean per item; the chosen ones follow one another from the first step to the last.
  For each position a:  sum(kept of items before a) + sum(need of items from a on) <= memory.
- *Stacks of equal groups*: their order is free, so it is the best one: largest need - kept first. Counts of
  items say all, and for each item j in that order  sum(kept_i * n_i, i <= j) <= memory - (need_j - kept_j).
  An item is then a whole group, or a checkpoint over several; the last group keeps its place, as its
  outputs count elsewhere.

On costs rounded up the solution keeps the budget; on costs rounded down the proven bound holds for
every schedule of the class: persistent, checkpoints at most one deep, inside a group or over whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.solvers.grid import GridCosts, group_kinds
from evoplan.planner.solvers.items import GroupTable, Item, ItemMaker

SHORT = 12  # steps up to which every step is chosen by itself
UNITS, MANY_GROUPS, MANY_GROUPS_UNITS = 1024, 8, 512  # of memory; a group's table has their square
GROUP_UNITS = 80  # at least, of the most that a group makes use of
WORK = 8.0  # of search, in OR-tools' deterministic time, so that a busy machine finds as much: half a minute
NOISE = 1e-9  # that sums of seconds in another order differ by, as a share
TICKS = 2**34  # of the slowest item: seconds become whole numbers


@dataclass(frozen=True)
class Answer:
    """What CP-SAT found.

    Attributes:
        seconds: of its best schedule; inf if it found none.
        bound_seconds: no schedule is faster; inf if there is none.
    """

    schedule: Sequence | None
    seconds: float
    bound_seconds: float


def applies(table: CostTable) -> bool:
    """Whether the chain is short, or a stack of equal groups."""
    return len(table.options) <= SHORT or len(set(group_kinds(table))) == 1


def answer(
    table: CostTable,
    budget_bytes: int | None,
    max_depth: int = 1,
    optimistic: bool = False,
    units: int | None = None,
    limit: float = WORK,
    known_seconds: float = np.inf,
) -> Answer:
    """Solve a chain for which it `applies`, for training.

    Args:
        budget_bytes: bounds `Replay.peak_bytes`; None is unlimited.
        max_depth: 0 or 1.
        optimistic: round costs down, for a bound; the schedule may need more then.
        units: steps of the grid of memory.
        limit: of search, in OR-tools' deterministic time.
        known_seconds: of a schedule that is known; no slower one is looked for.
    """
    if not applies(table):
        raise ValueError("cp-sat plans at most 12 steps, or any number of equal blocks; use --solver dp")
    if budget_bytes is None:
        budget_bytes = table.most_bytes
    memory_bytes = budget_bytes - table.bytes_of(table.liveness.outputs)
    if memory_bytes < 0:
        return Answer(None, np.inf, np.inf)
    if units is None:
        units = UNITS if len(table.groups) <= MANY_GROUPS else MANY_GROUPS_UNITS
    short = len(table.options) <= SHORT
    # By counts, the grid need only resolve what one group can make use of.
    unit = max(1, -(-memory_bytes // units))
    if not short:
        unit = max(1, min(unit, -(-_most_of_a_group(table) // GROUP_UNITS)))
    memory = memory_bytes // unit
    maker = ItemMaker(GridCosts(table, unit, memory + 1, optimistic), max_depth)
    return (_by_steps if short else _by_counts)(maker, memory, _Search(optimistic, limit, known_seconds))


def _most_of_a_group(table: CostTable) -> int:
    """More memory makes no group faster, nor lets it keep more."""
    steps = [table.options[step] for step in table.groups[0]]
    held = sum(max(cost.preserved_bytes for cost in options) for options in steps)
    state = len(steps) * max(table.state_bytes.values())
    peaks = (max(c.forward_bytes, c.backward_bytes, c.discard_bytes) for options in steps for c in options)
    return held + state + 2 * sum(table.state_bytes.values()) + max(peaks)


@dataclass(frozen=True)
class _Search:
    """How an integer program is solved."""

    optimistic: bool
    limit: float
    known_seconds: float

    def solve(
        self, model: cp_model.CpModel, cost: list[tuple[cp_model.IntVar, float]]
    ) -> tuple[cp_model.CpSolver | None, float]:
        """Minimise the seconds; the solver if it has a solution, and the bound."""
        scale = TICKS / max((seconds for _, seconds in cost if seconds), default=1.0)
        rounded = np.floor if self.optimistic else np.ceil
        total = sum(int(rounded(seconds * scale)) * variable for variable, seconds in cost)
        model.minimize(total)
        if np.isfinite(self.known_seconds):
            model.add(total <= int(np.ceil(self.known_seconds * scale * (1 + NOISE))))
        solver = cp_model.CpSolver()
        solver.parameters.max_deterministic_time = self.limit
        solver.parameters.num_workers = 2
        # With thousands of items these would take most of the limit, and find nothing.
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:  # nothing fits, or nothing as fast
            return None, self.known_seconds
        bound = solver.best_objective_bound / scale
        return (solver if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None), bound


def _by_steps(maker: ItemMaker, memory: int, search: _Search) -> Answer:
    """A boolean for each item; positions are steps."""
    table, costs = maker.table, maker.costs
    count = len(table.options)
    stops = {group.stop for group in table.groups}
    items = [item for step in range(count) for item in maker.recorded(step)]
    for group in table.groups:
        inside = {(a, b) for a in group for b in range(a + 1, group.stop + 1)}
        over = {(group.start, stop) for stop in stops if stop > group.start}
        for start, stop in sorted(inside | over):
            items += maker.checkpoints(start, stop)
    items = [item for item in items if item.need <= memory]
    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in items]
    for position in range(count):
        entering = sum(x for x, item in zip(chosen, items, strict=True) if item.stop == position)
        leaving = sum(x for x, item in zip(chosen, items, strict=True) if item.start == position)
        model.add(leaving == (1 if position == 0 else entering))
        held = sum(item.kept * x for x, item in zip(chosen, items, strict=True) if item.stop <= position)
        need = sum(item.need * x for x, item in zip(chosen, items, strict=True) if item.start == position)
        model.add(held + need <= memory)
    kept = sum(item.kept * x for x, item in zip(chosen, items, strict=True))
    model.add(kept + costs.units(table.loss_bytes) <= memory)
    cost = [(x, item.seconds) for x, item in zip(chosen, items, strict=True)]
    solver, bound = search.solve(model, cost)
    if solver is None:
        return Answer(None, np.inf, bound)
    taken = sorted((i for x, i in zip(chosen, items, strict=True) if solver.value(x)), key=lambda i: i.start)
    parts = tuple(part for item in taken for part in item.parts(item.start))
    return Answer(Sequence(parts), sum(item.seconds for item in taken), bound)


def _by_counts(maker: ItemMaker, memory: int, search: _Search) -> Answer:
    """A count for each item of the groups before the last, which are equal; a boolean for the last."""
    table, costs = maker.table, maker.costs
    groups = table.groups
    # Rounding up adds a unit or two to each step.
    size = min(costs.size, _most_of_a_group(table) // costs.unit_bytes + 3 * len(groups[0]) + 2)
    body = GroupTable(maker, 0, size).items() if len(groups) > 1 else []
    for end in range(1, len(groups)):
        body += maker.checkpoints(0, groups[end - 1].stop)
    final = GroupTable(maker, len(groups) - 1, size).items()
    for number in range(len(groups) - 1):
        final += maker.checkpoints(groups[number].start, groups[-1].stop)
    loss, length = costs.units(table.loss_bytes), len(groups[0])
    body = sorted((i for i in body if i.need <= memory), key=lambda i: (i.kept - i.need, i.kept, i.stop))
    final = [item for item in final if item.need <= memory]

    def covers(item: Item) -> int:
        return (item.stop - item.start) // length

    model = cp_model.CpModel()
    last = [model.new_bool_var("") for _ in final]

    def most_often(item: Item) -> int:
        fitting = (len(groups) - 1) // covers(item)
        return min(fitting, memory // item.kept) if item.kept else fitting

    counts = [model.new_int_var(0, most_often(item), "") for item in body]
    model.add_exactly_one(last)
    covered = sum(covers(item) * n for n, item in zip(counts, body, strict=True))
    model.add(covered + sum(covers(i) * x for x, i in zip(last, final, strict=True)) == len(groups))
    held: cp_model.LinearExpr | int = 0
    row: cp_model.LinearExpr | int = 0
    for number, (n, item) in enumerate(zip(counts, body, strict=True)):
        row += item.kept * n
        spare = item.need - item.kept
        if number + 1 == len(body) or body[number + 1].need - body[number + 1].kept != spare:
            total = model.new_int_var(0, max(0, memory - spare), "")
            model.add(total == held + row)
            held, row = total, 0
    model.add(held + sum(item.need * x for x, item in zip(last, final, strict=True)) <= memory)
    model.add(held + sum(item.kept * x for x, item in zip(last, final, strict=True)) + loss <= memory)
    cost = [(x, i.seconds) for x, i in [*zip(counts, body, strict=True), *zip(last, final, strict=True)]]
    solver, bound = search.solve(model, cost)
    if solver is None:
        return Answer(None, np.inf, bound)
    taken = [item for n, item in zip(counts, body, strict=True) for _ in range(solver.value(n))]
    taken += [item for x, item in zip(last, final, strict=True) if solver.value(x)]
    parts: list[Run | Checkpoint] = []
    at = 0
    for item in taken:
        parts += item.parts(at)
        at += item.stop - item.start
    return Answer(Sequence(tuple(parts)), sum(item.seconds for item in taken), bound)
