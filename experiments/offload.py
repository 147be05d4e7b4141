"""What host memory buys in training: the frontier with it and without, and what limits it.

    python -m evoplan.experiments.offload [--blocks 48] [--budgets 12] [--host 64GiB] [--json FILE]

AlphaFold 2's Evoformer at s=512, r=384 in float16 on the roofline of an A100, whose link to the host carries
24 GB/s each way. Bytes are activations: what is above parameters, their training state, inputs and outputs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
from rich.table import Table

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.planning import stacked, traced
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json
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
    for budget in sorted({*map(int, budgets), MARKED + outputs, large.peak_bytes}):
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m evoplan.experiments.offload", description=__doc__)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--host", default="64GiB", help="host memory that may be used")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    check_writable(json_path=options.json)
    with progress("tracing") as update:
        table = stacked(traced(512, 384), options.blocks)
        found = measured(table, options.budgets, parse_size(options.host), update)
    console = console_for_output(json_path=options.json)
    print_table(_table(found), console)
    console.print(
        f"whole frontier in {format_seconds(found['frontier_seconds'])}; keeping everything would take "
        f"{found['keep_everything']:.3f} of `large`'s time",
        highlight=False,
    )
    if options.json:
        write_json(options.json, {"blocks": options.blocks, "host": options.host, **found})


if __name__ == "__main__":
    main()
