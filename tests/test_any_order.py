"""The bound on every schedule against every schedule of short chains, persistent or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.planner.schedules.replay import replay
from evoplan.planner.solvers.any_order import any_order_bound
from tests.any_order import least_in_any_order
from tests.brute_force import by_replay, least_seconds, schedules
from tests.test_dp import UNITS, cases, tables


@cases(40)
@given(tables(steps=(1, 4), streams="m"))
def test_no_order_beats_the_bound_and_persistent_ones_are_among_them(table: CostTable) -> None:
    persistent = least_seconds(table, UNITS, by_replay)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in range(0, UNITS, 15):
        least = least_in_any_order(table, outputs + memory)
        assert any_order_bound(table, outputs + memory) <= least + 1e-9
        assert least <= persistent[memory] + 1e-9


@cases(60)
@given(tables(steps=(1, 4), several=True))
def test_no_persistent_schedule_beats_the_bound(table: CostTable) -> None:
    persistent = least_seconds(table, UNITS, by_replay)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in range(0, UNITS, 7):
        assert any_order_bound(table, outputs + memory) <= persistent[memory] + 1e-9


def test_without_a_limit_it_is_the_fastest_of_every_step(stack_table: CostTable) -> None:
    fastest = sum(
        min(c.forward_seconds + c.backward_seconds for c in options) for options in stack_table.options
    )
    assert any_order_bound(stack_table, 10**12) == pytest.approx(fastest)


def test_what_is_not_kept_is_owed(stack_table: CostTable) -> None:
    """Nothing of an earlier step can stay: every one that is not in pieces runs forward twice."""
    whole = [tuple(c for c in options if not c.strategy.in_pieces)[:1] for options in stack_table.options]
    table = replace(stack_table, options=tuple(whole))
    once = [c.forward_seconds + c.backward_seconds for (c,) in whole]
    again = [c.discard_seconds for (c,) in whole]
    room = table.bytes_of(table.liveness.outputs) + table.loss_bytes
    assert any_order_bound(table, room) >= sum(once) + sum(again[:-1]) - 1e-12


def part_of(table: CostTable, steps: range) -> CostTable:
    """A few steps of a block, over the one tensor that they write."""
    options: dict[int, tuple[StepCost, ...]] = {}
    for k in steps:
        kept = [c for c in table.options[k] if c.strategy.kernel == "eager"]
        options[k] = tuple(kept[:1] + [c for c in kept if c.strategy.kind == "chunk"][1:2])
    target = table.makes[steps[0]][0]
    return CostTable(
        options=tuple(options[k] for k in steps),
        step_reads=((target,),) * len(steps),
        groups=(range(len(steps)),),
        state_bytes={target: table.state_bytes[target]},
        loss_bytes=2 * table.state_bytes[target],
        training=True,
    )


def test_what_other_orders_gain_on_real_costs(stack_table: CostTable) -> None:
    """The triangle steps of a block, whole or in pieces, at nine budgets: a few per cent at most."""
    table = part_of(stack_table, range(4, 8))
    most = 2 * max(c.backward_bytes for options in table.options for c in options)
    played = [replay(schedule, table) for schedule in schedules(table)]
    gains = []
    for budget in np.linspace(most / 8, most, 9).astype(int):
        least = least_in_any_order(table, int(budget))
        if np.isfinite(least):
            persistent = min((p.seconds for p in played if p.peak_bytes <= budget), default=np.inf)
            gains.append(persistent / least - 1)
    assert gains
    assert min(gains) >= -1e-9
    assert max(gains) <= 0.05
