"""What host memory buys in training: the frontier with it and without, and what limits it.

    python -m evoplan.experiments.offload [--blocks 48] [--budgets 12] [--host 64GiB] [--json FILE]

AlphaFold 2's Evoformer at s=512, r=384 in float16 on the roofline of an A100, whose link to the host carries
24 GB/s each way. Bytes are activations: what is above parameters, their training state, inputs and outputs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import click
import numpy as np
from rich.table import Table

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.planning import MOST_BUDGETS, stacked, traced
from evoplan.planner.commands.flags import Size, json_option
from evoplan.planner.commands.terminal import console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.problems.problem import MOST_BLOCKS
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.schedules.replay import replay
from evoplan.planner.sizes import format_seconds, format_size, parse_size
from evoplan.planner.solvers import BASELINES, Frontier
from evoplan.planner.solvers.offload_frontier import OffloadFrontier, offload_bound

UNBOUNDED = 1e18  # bytes per second: copies that take no time
MARKED = parse_size("2.5GiB")


def row_of(
    table: CostTable, budget: int, plain: Frontier, found: OffloadFrontier, large: float
) -> dict[str, Any]:
    """One budget: seconds over those of `large` without host memory, with it, and at best."""
    schedule = found.schedule(budget)
    played, bound = replay(schedule, table), offload_bound(table, budget)
    copied = 2 * played.host_bytes / (table.host_bandwidth or np.inf)
    waited = sum(moment.seconds for moment in played.moments if moment.phase.endswith("host"))
    return {
        "budget_bytes": budget - found.output_bytes,
        "without": plain.seconds(budget) / large,
        "with": played.seconds / large,
        "free_copies": offload_bound(replace(table, host_bandwidth=UNBOUNDED), budget) / large,
        "gap": played.seconds / bound - 1,
        "host_bytes": played.host_bytes,
        "copies_share": copied / played.seconds,
        "waited_share": waited / played.seconds,
        "records": sum("record" in part.wait for part in schedule.parts),
        "parts": len(schedule.parts),
    }


def measured(table: CostTable, count: int, host_bytes: int, update: Any = lambda _: None) -> dict[str, Any]:
    """The rows, and how long the whole frontier takes.

    Args:
        count: budgets on a logarithmic scale from the least to the peak of `large`, which is one of them.
    """
    large = replay(BASELINES["large"](table), table)
    plain = Frontier(table)
    start = time.perf_counter()
    found = OffloadFrontier(table, host_bytes)
    found.solve()
    seconds = time.perf_counter() - start
    outputs = found.output_bytes
    budgets = np.geomspace(found.least_replay.peak_bytes, large.peak_bytes, count)
    rows = []
    for budget in sorted({*map(int, budgets), max(MARKED + outputs, int(budgets[0])), large.peak_bytes}):
        update(f"{format_size(budget - outputs)} of activations")
        rows.append(row_of(table, budget, plain, found, large.seconds))
    return {
        "frontier_seconds": seconds,
        "large": {"budget_bytes": large.peak_bytes - outputs, "seconds": large.seconds},
        "keep_everything": plain.seconds(plain.most_bytes + outputs) / large.seconds,
        "least_without_bytes": plain.least_replay.peak_bytes - outputs,
        "rows": rows,
    }


def _table(found: dict[str, Any]) -> Table:
    title = "step time over that of `large`"
    shown = new_table(title, "activations", "without", "with", "copies free", "gap", "on the host", "waits")
    for row in found["rows"]:
        without = "-" if np.isinf(row["without"]) else f"{row['without']:.3f}"
        shares = f"{row['with']:.3f}", f"{row['free_copies']:.3f}", f"{row['gap']:.2%}"
        host = format_size(row["host_bytes"]), f"{row['waited_share']:.1%}"
        shown.add_row(format_size(row["budget_bytes"]), without, *shares, *host)
    return shown


@click.command(help=__doc__)
@click.option("--blocks", type=click.IntRange(1, MOST_BLOCKS), default=48, show_default=True)
@click.option("--budgets", type=click.IntRange(1, MOST_BUDGETS), default=12, show_default=True)
@click.option("--host", type=Size(), default="64GiB", show_default=True, help="Host memory that may be used.")
@json_option
def command(blocks: int, budgets: int, host: int, json_path: str | None) -> None:
    """Print the table."""
    check_writable(json_path=json_path)
    with progress("tracing") as update:
        table = stacked(traced(512, 384), blocks)
        found = measured(table, budgets, host, update)
    console = console_for_output(json_path=json_path)
    print_table(_table(found), console)
    console.print(
        f"whole frontier in {format_seconds(found['frontier_seconds'])}; keeping everything would take "
        f"{found['keep_everything']:.3f} of `large`'s time",
        highlight=False,
    )
    if json_path:
        write_json(json_path, {"blocks": blocks, "host": format_size(host), **found})


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.offload")
