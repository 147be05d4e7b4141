"""Schedules of which something waits in host memory, for tests."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from evoplan.cost_model.costs import CostTable
from evoplan.model import EvoformerConfig, EvoformerStack, InputShape
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.offload import has_record, last_read
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence
from tests.conftest import random_schedule_of

CONFIG = EvoformerConfig(2, 24, 20, 4, 2, 8, 8, 40, 2, c_head_msa=8)
SHAPE = InputShape(11, 13)


def with_waits(schedule: Sequence, liveness: Any, rng: random.Random, share: float = 0.7) -> Sequence:
    """The schedule, of which much of what may wait does."""
    parts = []
    for part in schedule.parts[:-1]:
        may = [version.tensor for version in last_read(liveness, part.span)]
        if isinstance(part, Run) and has_record(part.strategy):
            may.append(RECORD)
        parts.append(replace(part, wait=tuple(name for name in may if rng.random() < share)))
    return Sequence((*parts, schedule.parts[-1]))


def random_of(table: CostTable, stack: EvoformerStack, rng: random.Random) -> Sequence:
    """A random schedule of the table's own strategies."""
    shape = random_schedule_of(stack, rng.randint(0, 99))

    def known(body: Sequence) -> Sequence:
        return Sequence(tuple(map(one, body.parts)))

    def some(step: int) -> Any:
        return rng.choice([c.strategy for c in table.options[step] if "compiled" not in str(c.strategy)])

    def one(part: Run | Checkpoint) -> Run | Checkpoint:
        if isinstance(part, Run):
            return Run(part.step, some(part.step))
        return Checkpoint(known(part.body), tuple(map(some, part.span)))

    return known(shape)


def asked(**update: Any) -> Problem:
    given = {"config": CONFIG, "shape": InputShape(24, 32), "device": "a100-40gb", "host_bytes": 2**30}
    return Problem(model="custom", **(given | update))
