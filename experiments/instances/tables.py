"""Cost tables as JSON: equal steps and blocks are stored once, so that 1,000 blocks take what one does."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.strategy import Strategy

# Of a StepCost, in the order in which a file has them after the strategy.
FIELDS = (
    "forward_bytes", "preserved_bytes", "backward_bytes", "discard_bytes", "discard_seconds",
    "forward_seconds", "backward_seconds", "backward_held_bytes",
)  # fmt: skip


def table_to_json(table: CostTable) -> dict[str, Any]:
    """A table without what its times were made from; a whole run that ends a redo costs as any other."""
    numbers: dict[int, int] = {}
    costs: list[list[list[Any]]] = []
    for options in table.options:
        if id(options) not in numbers:
            rows = [_cost_to_json(cost) for cost in options]
            numbers[id(options)] = costs.index(rows) if rows in costs else len(costs)
            if numbers[id(options)] == len(costs):
                costs.append(rows)
    lengths = {unit.start: len(unit) for unit in table.units}

    def block(group: range) -> dict[str, Any]:
        return {
            "costs": [numbers[id(table.options[step])] for step in group],
            "reads": [list(table.step_reads[step]) for step in group],
            "makes": None if table.step_makes is None else [list(table.step_makes[step]) for step in group],
            "units": [lengths[step] for step in group if step in lengths],
        }

    return {
        "training": table.training, "state_bytes": dict(table.state_bytes), "loss_bytes": table.loss_bytes,
        "outputs": None if table.outputs is None else list(table.outputs), "input_bytes": table.input_bytes,
        "host_bandwidth": table.host_bandwidth, "costs": costs,
        "blocks": [{"count": len(list(same)), **first} for first, same in groupby(map(block, table.groups))],
    }  # fmt: skip


def table_from_json(found: dict[str, Any]) -> CostTable:
    """The inverse of `table_to_json`: equal steps share one tuple of options."""
    costs = [tuple(map(_cost_from_json, rows)) for rows in found["costs"]]
    options: list[tuple[StepCost, ...]] = []
    reads: list[tuple[str, ...]] = []
    makes: list[tuple[str, ...]] = []
    groups: list[range] = []
    units: list[range] = []
    for block in found["blocks"]:
        for _ in range(block["count"]):
            start = at = len(options)
            options += [costs[number] for number in block["costs"]]
            reads += map(tuple, block["reads"])
            makes += map(tuple, block["makes"] or ())
            groups.append(range(start, len(options)))
            for length in block["units"]:
                units.append(range(at, at + length))
                at += length
    return CostTable(
        options=tuple(options),
        step_reads=tuple(reads),
        groups=tuple(groups),
        state_bytes=dict(found["state_bytes"]),
        loss_bytes=found["loss_bytes"],
        training=found["training"],
        outputs=None if found["outputs"] is None else tuple(found["outputs"]),
        units=tuple(units),
        input_bytes=found["input_bytes"],
        host_bandwidth=found["host_bandwidth"],
        step_makes=tuple(makes) or None,
    )


def _cost_to_json(cost: StepCost) -> list[Any]:
    return [str(cost.strategy), *(getattr(cost, name) for name in FIELDS), list(cost.keeps_made)]


def _cost_from_json(row: list[Any]) -> StepCost:
    strategy, *figures, keeps_made = row
    named: dict[str, Any] = dict(zip(FIELDS, figures, strict=True))
    named |= {f"{phase}_work": Work() for phase in ("discard", "forward", "backward")}
    return StepCost(Strategy.parse(strategy), keeps_made=tuple(keeps_made), **named)
