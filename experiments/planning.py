"""The planner's own figures: how far from optimal, how fast, and what it gains over recomputing blocks.

    python -m evoplan.experiments.planning [--skip-long]

AlphaFold 2's Evoformer in float16 on the roofline of an A100. Costs are traced once per shape; deeper stacks
repeat the steps of one block. Everything else is solver time, on one thread.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from evoplan.cost_model.costs import CostTable
from evoplan.model.config import override
from evoplan.model.families import preset
from evoplan.planner.commands.terminal import (
    CHECK_FAILED,
    Progress,
    console_for_output,
    progress,
    run_command,
)
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.plans.certify import CLOSE
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.schedules.replay import replay
from evoplan.planner.sizes import format_seconds, format_size
from evoplan.planner.solvers import BASELINES, Frontier, cp_sat
from evoplan.planner.solvers.bounds import LowerBound

RESULTS = Path(__file__).parent / "results" / "planning.json"
DEVICE, DTYPE, GIB = "a100-40gb", "float16", 2**30
# (s, r, share of `large`'s activations that its time must be reached with)
SHAPES = [(512, 384, 0.80), (512, 256, 0.90), (128, 256, 0.72)]
BUDGETS = 500
MOST_BUDGETS = 10_000  # of whoever asks for others
# (blocks, seconds allowed for the frontier, grid steps of its bound)
DEPTHS = [(48, 1.0, 8192), (200, 10.0, 4096), (1000, 60.0, 2048)]
GAPS = [1, 4, 48]


def traced(s: int, r: int) -> CostTable:
    """Costs of 48 blocks."""
    chosen = preset("alphafold2-finetune")
    problem = Problem(
        model="alphafold2", config=chosen.config, shape=override(chosen.shape, n_seq=s, n_res=r),
        dtype=DTYPE, device=DEVICE,
    )  # fmt: skip
    return cost_problem(problem).table


def stacked(table: CostTable, blocks: int) -> CostTable:
    """So many of its blocks."""
    size = len(table.groups[0])
    return replace(
        table,
        options=table.options[:size] * blocks,
        step_reads=table.step_reads[:size] * blocks,
        groups=tuple(range(i, i + size) for i in range(0, blocks * size, size)),
    )


def against_large(s: int, r: int, table: CostTable, share: float) -> dict[str, Any]:
    """The least memory with which `large`'s time is reached, and times at small budgets over `large`'s."""
    frontier, large = Frontier(table), replay(BASELINES["large"](table), table)
    outputs = large.output_bytes
    budget = next(b for b in frontier.budgets(2000) if frontier.seconds(b) <= large.seconds)
    played = replay(frontier.schedule(budget), table)
    return {
        "s": s, "r": r,
        "large_activation_bytes": large.peak_bytes - outputs, "large_seconds": large.seconds,
        "planned_activation_bytes": played.peak_bytes - outputs, "planned_seconds": played.seconds,
        "share": (played.peak_bytes - outputs) / (large.peak_bytes - outputs), "asked": share,
        "least_activation_bytes": frontier.least_replay.peak_bytes - outputs,
        "time_over_large": {
            f"{gib} GiB": frontier.seconds(int(gib * GIB) + outputs) / large.seconds for gib in (1.5, 2.5, 4)
        },
    }  # fmt: skip


def frontier_time(table: CostTable, blocks: int, bound_units: int) -> dict[str, Any]:
    """Seconds for least times at so many budgets, and the largest proven gap."""
    table = stacked(table, blocks)
    start = time.process_time()
    frontier = Frontier(table)
    budgets = frontier.budgets(BUDGETS)
    times = [frontier.seconds(budget) for budget in budgets]
    seconds = time.process_time() - start
    assert all(b <= a for a, b in pairwise(times))
    start = time.process_time()
    bound = LowerBound(table, spans=frontier.spans, units=bound_units)
    gaps = {
        budget: seconds / bound.seconds(budget, enough=seconds / (1 + CLOSE)) - 1
        for budget, seconds in zip(budgets, times, strict=True)
    }
    worst = max(gaps, key=lambda budget: gaps[budget])
    return {
        "blocks": blocks, "budgets": len(budgets), "seconds": seconds,
        "bound_seconds": time.process_time() - start,
        "largest_gap": gaps[worst], "at_bytes": worst,
        "over_1_percent": sum(gap > CLOSE for gap in gaps.values()),
        "median_gap": sorted(gaps.values())[len(gaps) // 2],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def gap_rows(table: CostTable, blocks: int, say: Progress, count: int = 10) -> list[dict[str, Any]]:
    """Proven gaps at ten budgets: any depth by rounding down, one level of checkpoints by CP-SAT."""
    table = stacked(table, blocks)
    frontier, flat = Frontier(table), Frontier(table, max_depth=1)
    bound = LowerBound(table)
    rows = []
    for budget in flat.budgets(count)[:count]:
        start = time.perf_counter()
        best = flat.seconds(budget)
        proved = cp_sat.answer(table, budget, max_depth=1, optimistic=True, known_seconds=best).bound_seconds
        rows.append(
            {
                "blocks": blocks, "budget_bytes": budget,
                "seconds": frontier.seconds(budget),
                "gap": max(0.0, frontier.seconds(budget) / bound.seconds(budget) - 1),
                "depth_1_seconds": best,
                "cp_sat_gap": max(0.0, best / proved - 1) if proved else np.inf,
                "cp_sat_seconds": time.perf_counter() - start,
            }
        )  # fmt: skip
        say.done(
            f"{blocks} blocks, {format_size(budget)}: gap at most {rows[-1]['gap']:.2%}, of one level of "
            f"checkpoints {rows[-1]['cp_sat_gap']:.2%}"
        )
    return rows


def _beside_large(rows: list[dict[str, Any]]) -> Table:
    shown = new_table(
        "activations with which large's time is reached; time over large's within a budget",
        "s, r", "large", "planned", "share", "asked", "1.5 GiB", "2.5 GiB", "4 GiB",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            f"{row['s']}, {row['r']}", format_size(row["large_activation_bytes"]),
            format_size(row["planned_activation_bytes"]), f"{row['share']:.1%}", f"{row['asked']:.0%}",
            *(f"{over:.2f} x" for over in row["time_over_large"].values()),
        )  # fmt: skip
    return shown


def _frontiers(rows: list[dict[str, Any]]) -> Table:
    shown = new_table(
        "least times at many budgets, and how far from a bound they are",
        "blocks", "budgets", "frontier", "its bound", "largest gap", "at", "median gap", "memory",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            str(row["blocks"]), str(row["budgets"]),
            format_seconds(row["seconds"]), format_seconds(row["bound_seconds"]),
            f"{row['largest_gap']:.2%}", format_size(row["at_bytes"]), f"{row['median_gap']:.2%}",
            format_size(row["peak_rss_bytes"]),
        )  # fmt: skip
    return shown


def _gaps(rows: list[dict[str, Any]]) -> Table:
    shown = new_table(
        "gaps to a bound: any depth by rounding down, one level of checkpoints by CP-SAT",
        "blocks", "budget", "any depth", "gap", "one level", "gap by CP-SAT", "CP-SAT took",
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            str(row["blocks"]), format_size(row["budget_bytes"]), format_seconds(row["seconds"]),
            f"{row['gap']:.2%}", format_seconds(row["depth_1_seconds"]), f"{row['cp_sat_gap']:.2%}",
            format_seconds(row["cp_sat_seconds"]),
        )  # fmt: skip
    return shown


@click.command(help=__doc__)
@click.option("--skip-long", is_flag=True, help="Neither 1,000 blocks nor CP-SAT on 48.")
def command(skip_long: bool) -> None:
    """Print the figures, write them as JSON; exit code 1 if some are not as asked."""
    check_writable(RESULTS)
    long = not skip_long
    console, beside, depths, gaps = console_for_output(), [], [], []
    with progress("tracing") as say:
        tables = {}
        for s, r, share in SHAPES:
            say(f"tracing s={s}, r={r}")
            tables[s, r] = traced(s, r)
            beside.append(against_large(s, r, tables[s, r], share))
            say.done(f"s={s}, r={r}: beside large")
        table = tables[512, 384]
        for blocks, _, units in DEPTHS:
            if long or blocks < 1000:
                say(f"the frontier of {blocks} blocks")
                depths.append(frontier_time(table, blocks, units))
                say.done(f"{blocks} blocks: frontier in {format_seconds(depths[-1]['seconds'])}")
        for blocks in GAPS:
            if long or blocks < 48:
                gaps += gap_rows(table, blocks, say)
    for shown in (_beside_large(beside), _frontiers(depths), _gaps(gaps)):
        print_table(shown, console)

    write_json(
        RESULTS,
        {"device": DEVICE, "dtype": DTYPE, "against_large": beside, "frontiers": depths, "gaps": gaps},
    )
    checks = [
        *(row["share"] <= row["asked"] for row in beside),
        beside[0]["time_over_large"]["2.5 GiB"] <= 1.8,
        *(row["seconds"] < allowed for row, (_, allowed, _) in zip(depths, DEPTHS, strict=False)),
        *(row["largest_gap"] <= CLOSE for row in depths),
        *(row["gap"] <= 0.01 and row["cp_sat_gap"] <= 0.01 for row in gaps if row["blocks"] <= 4),
    ]
    sys.exit(0 if all(checks) else CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.planning")
