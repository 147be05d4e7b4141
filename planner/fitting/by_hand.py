"""What people do by hand with blocks that somebody else wrote, as a schedule."""

from __future__ import annotations

from evoplan.cost_model.costs import CostTable
from evoplan.model.foreign.inside import ALL_AGAIN
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.solvers import BASELINES

AGAIN = Strategy(WHOLE.kind, within=ALL_AGAIN)


def each_block_again(table: CostTable) -> Sequence:
    """`large`: torch.utils.checkpoint around each block; one of ours where that is not offered."""
    return Sequence(tuple(_again(table, part) for part in BASELINES["large"](table).parts))


def _again(table: CostTable, part: Run | Checkpoint) -> Run | Checkpoint:
    (step,) = part.span
    offered = {cost.strategy for cost in table.options[step]}
    return Run(step, AGAIN) if AGAIN in offered else part
