"""How many residues fit into a device's memory: searched by the least peak that the planner finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evoplan.cost_model.devices import device
from evoplan.model.config import override
from evoplan.model.families import PRESETS, preset
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.device_file import one_line
from evoplan.planner.problems.problem import Mode, Problem

MOST = 2**16  # residues: beyond that nothing is searched
BEYOND = 2**62  # bytes of what no machine has


@dataclass(frozen=True)
class Asked:
    """One row of figures: a preset's stack, how it is run, and on how many ranks.

    Attributes:
        how: fields of the problem besides, such as dtype.
        rows: of the alignment, in place of the preset's.
        step: residues are searched in multiples of it, and of the ranks, which then share evenly.
    """

    model: str
    mode: Mode
    ranks: int
    how: dict[str, Any]
    rows: int | None = None
    step: int = 32

    @property
    def unit(self) -> int:
        """What residues are a multiple of."""
        return math.lcm(self.step, self.ranks)

    def problem(self, n_res: int, on: str) -> Problem:
        """So many residues on a device, whose memory is the budget.

        Raises:
            ValueError: there is no such problem; says why.
        """
        chosen = preset(self.model)
        rows = None if chosen.shape.n_seq is None else self.rows
        shape = override(chosen.shape, n_res=n_res, n_seq=rows)
        with one_line():
            return Problem(
            model=self.model, config=chosen.config, shape=shape, mode=self.mode, ranks=self.ranks, device=on,
            budget_bytes=device(on).memory_bytes, **self.how,
        )  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """What fits on one device (each of the ranks' devices); simulated.

    Attributes:
        n_res: the most residues; None: not even the fewest that are tried fit, or `why` says what is wrong.
        peak_bytes, step_seconds: of the fastest plan for so many within the device's memory.
    """

    model: str
    mode: Mode
    ranks: int
    device: str
    memory_bytes: int
    n_res: int | None = None
    peak_bytes: int | None = None
    step_seconds: float | None = None
    why: str = ""


def capacities(asked: Asked, devices: Sequence[str]) -> Iterator[Capacity]:
    """The most residues on each device, from the least memory on."""
    leasts: dict[int, int] = {}  # by residues, without what a device's libraries take: alike on all devices

    def least(n_res: int) -> int:
        if n_res not in leasts:
            on = devices[0]
            try:
                found = _least(cost_problem(asked.problem(n_res, on))) - device(on).workspace_bytes
            except ValueError:
                if not leasts:
                    raise
                found = BEYOND  # more than can be planned for
            leasts[n_res] = found
        return leasts[n_res]

    for name in sorted(devices, key=lambda name: device(name).memory_bytes or 0):
        memory = device(name).memory_bytes
        if memory is None:
            raise ValueError(f"the memory of {name} is not known; name another device")
        row = Capacity(asked.model, asked.mode, asked.ranks, name, memory)
        try:
            start = max(asked.unit, preset(asked.model).shape.n_res // asked.unit * asked.unit)
            n_res = largest(least, memory - device(name).workspace_bytes, asked.unit, start, leasts)
            if n_res:
                found = solve(cost_problem(asked.problem(n_res, name))).predicted
                row = replace(row, n_res=n_res, peak_bytes=found.peak_bytes, step_seconds=found.step_seconds)
        except NoPlanError:
            raise
        except ValueError as error:
            row = replace(row, why=str(error))
        yield row


def largest(
    least: Callable[[int], int], budget: int, unit: int, start: int, known: dict[int, int] | None = None
) -> int:
    """The most residues whose least peak is within a budget, by bisection: a multiple of `unit`, 0: none.

    Every other time the middle is where a power of the residues through both ends meets the budget.

    Args:
        least: peak in bytes by residues, which does not fall.
        start: where to begin, where nothing is known.
        known: peaks by residues that are known already.
    """
    known = {} if known is None else known
    low = max((n for n, size in known.items() if size <= budget), default=0)
    high = min((n for n, size in known.items() if size > budget), default=0)
    at = low * 2 or start
    while not high:
        if low >= MOST:
            return low
        at = min(at, MOST)
        low, high = (at, 0) if least(at) <= budget else (low, at)
        at = 2 * low
    turn = 0
    while high - low > unit:
        middle = (low + high) // 2
        if low and turn % 2 == 0:
            power = math.log(least(high) / least(low)) / math.log(high / low)
            if power > 0:
                middle = int(low * (budget / least(low)) ** (1 / power)) + unit // 2
        middle = min(max(middle // unit * unit, low + unit), high - unit)
        low, high = (middle, high) if least(middle) <= budget else (low, middle)
        turn += 1
    return low


def distinct_presets() -> list[str]:
    """Presets without those that another one's residues alone tell apart: these are searched for."""
    seen: dict[Any, str] = {}
    for name, one in PRESETS.items():
        seen.setdefault((one.config, replace(one.shape, n_res=1)), name)
    return list(seen.values())


def published() -> list[dict[str, Any]]:
    """What others say fits where: model, mode, devices, tokens, seconds or None, about, source."""
    rows: list[dict[str, Any]] = json.loads(
        Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    )
    return rows


def _least(costed: Costed) -> int:
    """The least budget of a problem that has a plan, in bytes."""
    try:
        solve(replace(costed, problem=costed.problem.model_copy(update={"budget_bytes": 1})))
    except NoPlanError as error:
        return error.least_feasible_bytes
    raise AssertionError("nothing fits one byte")
