"""Certificates at many budgets: how close they come, how large they are, and whether the checker takes them.

    python -m evoplan.experiments.certificates [--budgets 500] [--blocks 48] [--json FILE]

AlphaFold 2's Evoformer at s=512, r=384 in float16 on the roofline of an A100. Of each budget the frontier's
schedule gets a certificate; the checker, in a process of its own, decides.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.table import Table

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.planning import DEVICE, DTYPE, MOST_BUDGETS, stacked, traced
from evoplan.planner.commands.flags import json_option
from evoplan.planner.commands.terminal import CHECK_FAILED, console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.plans.certificate import certificate
from evoplan.planner.plans.certify import CLOSE
from evoplan.planner.problems.problem import MOST_BLOCKS
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.schedules.replay import replay
from evoplan.planner.sizes import format_seconds, format_size
from evoplan.planner.solvers import Frontier
from evoplan.planner.solvers.bounds import LowerBound

CHECKER = Path(__file__).resolve().parents[1] / "tools" / "check_certificate.py"


def certified(
    table: CostTable, frontier: Frontier, bound: LowerBound, budget: int, folder: Path
) -> dict[str, Any]:
    """One budget: the certificate's gap, that of the frontier's own bound, and what the checker says."""
    schedule = frontier.schedule(budget)
    start = time.perf_counter()
    document = certificate(table, schedule, budget, {"budget_bytes": budget})
    made = time.perf_counter() - start
    path = folder / "certificate.json"
    path.write_text(json.dumps(document))
    start = time.perf_counter()
    checked = subprocess.run(
        [sys.executable, "-I", str(CHECKER), str(path)], capture_output=True, text=True, check=False
    )
    proved, seconds = document["bound"]["seconds"], replay(schedule, table).seconds
    return {
        "budget_bytes": budget,
        "seconds": seconds,
        "gap": None if proved is None else seconds / float(proved) - 1,
        "own_gap": seconds / bound.seconds(budget, enough=seconds / (1 + CLOSE)) - 1,
        "valid": checked.returncode == 0,
        "made_seconds": made,
        "checked_seconds": time.perf_counter() - start,
        "file_bytes": path.stat().st_size,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest and median of each figure, and how many certificates hold."""
    found: dict[str, Any] = {"budgets": len(rows), "valid": sum(row["valid"] for row in rows)}
    for name in ("gap", "own_gap", "made_seconds", "checked_seconds", "file_bytes"):
        figures = [row[name] for row in rows if row[name] is not None]
        found[name] = {"median": median(figures), "largest": max(figures)}
    found["gap_over_own"] = max(row["gap"] - row["own_gap"] for row in rows if row["gap"] is not None)
    found["over_1_percent"] = [row["budget_bytes"] for row in rows if row["gap"] is None or row["gap"] > 0.01]
    return found


def _in_words(row: dict[str, Any], number: int, budgets: int) -> str:
    gap = "no bound" if row["gap"] is None else f"gap {row['gap']:.3%}"
    said = "holds" if row["valid"] else "DOES NOT HOLD"
    return (
        f"{number} of {budgets}, {format_size(row['budget_bytes'])}: {said}, {gap}, checked in "
        f"{format_seconds(row['checked_seconds'])}"
    )


def _table(found: dict[str, Any]) -> Table:
    shown = new_table("certificates", "", "median", "largest")
    shown.add_row("gap of the certificate", *(f"{x:.3%}" for x in found["gap"].values()))
    shown.add_row("gap of the frontier's own bound", *(f"{x:.3%}" for x in found["own_gap"].values()))
    shown.add_row("made in", *map(format_seconds, found["made_seconds"].values()))
    shown.add_row("checked in", *map(format_seconds, found["checked_seconds"].values()))
    shown.add_row("file", *map(format_size, found["file_bytes"].values()))
    return shown


@click.command(help=__doc__)
@click.option(
    "--budgets",
    type=click.IntRange(1, MOST_BUDGETS),
    default=500,
    show_default=True,
    help="On a logarithmic scale, from the least on.",
)
@click.option("--blocks", type=click.IntRange(1, MOST_BLOCKS), default=48, show_default=True)
@json_option
def command(budgets: int, blocks: int, json_path: str | None) -> None:
    """Print the table; exit code 1 if a certificate does not hold."""
    check_writable(json_path=json_path)
    table = stacked(traced(512, 384), blocks)
    frontier = Frontier(table)
    bound = LowerBound(table, spans=frontier.spans)
    rows = []
    asked = frontier.budgets(budgets)
    with TemporaryDirectory() as folder, progress("certifying") as say:
        for budget in asked:
            rows.append(certified(table, frontier, bound, budget, Path(folder)))
            say.done(_in_words(rows[-1], len(rows), len(asked)))
    found = summary(rows)
    if json_path:
        about = {"device": DEVICE, "dtype": DTYPE, "blocks": blocks}
        write_json(json_path, {**about, "summary": found, "budgets": rows})
    console = console_for_output(json_path=json_path)
    print_table(_table(found), console)
    over = ", ".join(map(format_size, found["over_1_percent"]))
    console.print(
        f"{found['valid']} of {found['budgets']} hold; gap over 1 %: {over or 'nowhere'}", highlight=False
    )
    sys.exit(0 if found["valid"] == found["budgets"] else CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.certificates")
