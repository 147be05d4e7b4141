"""The original benchmark's five policies, its figures, and the schedules to run them under."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from evoplan.model.config import override
from evoplan.model.families import preset
from evoplan.planner.checking.verify import simulate_plan
from evoplan.planner.plans.plan import Plan, SolverReport
from evoplan.planner.plans.planning import plan_of, solve
from evoplan.planner.problems.costing import Costed
from evoplan.planner.problems.problem import Mode, Problem
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.solvers import BASELINES
from evoplan.planner.solvers.baselines import evenly_chunked

SCHEDULES = ("none", "small", "large", "chunk", "planned")
SEED_TABLES = Path(__file__).parent / "data" / "seed-tables.json"


@dataclass(frozen=True)
class Policy:
    """What is run and on how many devices.

    Attributes:
        model: name of a preset, in full depth.
        shapes: (s, r) of the original tables.
        ranks: devices that share one input.
        reduced: (blocks, s, r) that a processor runs in seconds.
    """

    model: str
    mode: Mode
    dtype: str
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    reduced: tuple[int, int, int]

    def problem(
        self,
        shape: tuple[int, int],
        ranks: int,
        device: str,
        blocks: int | None = None,
        dtype: str | None = None,
    ) -> Problem:
        """The policy at a size. The original figures hold no optimizer states, and neither does this."""
        chosen = preset(self.model)
        config = chosen.config if blocks is None else chosen.config.with_blocks(blocks)
        return Problem(
            model=self.model, config=config, shape=override(chosen.shape, n_seq=shape[0], n_res=shape[1]),
            dtype=dtype or self.dtype, mode=self.mode, optimizer="none", device=device, ranks=ranks,
        )  # fmt: skip


_MAIN, _EXTRA = ((128, 256), (512, 256), (512, 384)), ((1024, 256), (1024, 384), (5120, 384))
POLICIES = {
    "single": Policy("alphafold2", "training", "float16", _MAIN, (1,), (2, 32, 48)),
    "dap": Policy("alphafold2", "training", "float16", _MAIN, (2,), (2, 33, 47)),
    "extra-single": Policy("alphafold2-extra", "training", "float16", _EXTRA, (1,), (2, 160, 48)),
    "single-inference": Policy("alphafold2", "inference", "float32", ((128, 2048),), (1,), (2, 16, 256)),
    "dap-inference": Policy("alphafold2", "inference", "float32", ((128, 2048),), (2, 4), (2, 17, 255)),
}


def schedule_of(name: str, costed: Costed) -> Sequence:
    """A schedule that people choose by hand, for a problem and its budget.

    `chunk` cuts every submodule into equally many pieces, the fewest that fit the budget, and recomputes
    every block: one chunk size for all modules, as tuned by hand.

    Raises:
        ValueError: no such schedule, or one that makes no sense in inference.
    """
    if not costed.table.training and name in ("small", "large"):
        raise ValueError(f"--schedule {name} recomputes in backward, and inference has none; use chunk")
    if name in BASELINES:
        return BASELINES[name](costed.table)
    if name != "chunk":
        raise ValueError(f"unknown schedule {name!r}; choose one of: {', '.join(SCHEDULES)}")
    budget = costed.chain_budget()
    for power in count(1):
        schedule = evenly_chunked(costed.table, 2**power)
        most = evenly_chunked(costed.table, 2 ** (power + 1)) == schedule
        if most or budget is None or replay(schedule, costed.table).peak_bytes <= budget:
            return schedule
    raise AssertionError


def plan_under(costed: Costed, schedule: str, budget: int | None) -> Plan:
    """The plan that a schedule makes of a costed problem.

    Raises:
        NoPlanError: `planned` finds nothing that fits.
    """
    problem = costed.problem.model_copy(update={"budget_bytes": budget})
    costed = replace(costed, problem=problem)
    if schedule == "planned":
        return solve(costed)
    return plan_of(costed, schedule_of(schedule, costed), SolverReport(name=schedule, seconds=0.0))


def figures(costed: Costed, plan: Plan, simulate: bool = True) -> dict[str, Any]:
    """What a plan needs; its peak by running the first rank on tensors without data, or as predicted."""
    held = None  # by the end of forward
    if costed.table.training:
        moments = replay(plan.schedule, costed.table).moments
        held = costed.fixed_bytes + next(m.held_bytes for m in moments if m.phase == "loss")
    return {
        "schedule": plan.solver.name,
        "peak_bytes": simulate_plan(plan).measured_peak_bytes if simulate else plan.predicted.peak_bytes,
        "predicted_peak_bytes": plan.predicted.peak_bytes,
        "held_bytes": held,
        "step_seconds": plan.predicted.step_seconds,
    }


def original(policy: str, schedule: str, shape: tuple[int, int], ranks: int) -> dict[str, Any] | None:
    """The original figures, where there are any: `planned` is set beside the leanest of them."""
    rows = [
        row
        for row in seed_rows()
        if (row["policy"], row["n_seq"], row["n_res"], row["ranks"]) == (policy, *shape, ranks)
        and (row["schedule"] == schedule or (schedule == "planned" and row["peak_mb"]))
    ]
    return min(rows, key=lambda row: row["peak_mb"] or 0, default=None)


def seed_rows() -> list[dict[str, Any]]:
    """The original tables, row by row."""
    rows: list[dict[str, Any]] = json.loads(SEED_TABLES.read_text(encoding="utf-8"))["rows"]
    return rows
