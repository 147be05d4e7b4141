"""Which strategy wins where: what plans run steps under at the last, over budgets of several problems.

    python -m evoplan.experiments.strategies [--budgets 24] [--json PATH]

On the roofline of an A100, from the least budget to the largest. A step counts once for each budget, by the
strategy that its backward is computed from (in inference, that it runs under). Beside it: how many of the
strategies of a kind are worth having at all, no other being as good in every byte and second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import click
from rich.table import Table

from evoplan.cost_model.call_times import needed
from evoplan.cost_model.costs import CostTable
from evoplan.model import PRESETS, InputShape
from evoplan.model.running.strategy import EAGER, KINDS, Strategy
from evoplan.planner.commands.flags import json_option
from evoplan.planner.commands.terminal import console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.schedules.schedule import Checkpoint, Sequence
from evoplan.planner.sizes import format_seconds, format_size
from evoplan.planner.solvers import Frontier

DEVICE, PIECES = "a100-40gb", 4
# Model, mode, sequences (0: it reads none), residues, ranks.
PROBLEMS: list[tuple[str, Literal["training", "inference"], int, int, int]] = [
    ("alphafold2", "training", 128, 256, 1),
    ("alphafold2", "training", 512, 384, 1),
    ("alphafold2", "training", 512, 384, 4),
    ("alphafold2-extra", "training", 5120, 384, 1),
    ("pairformer-48", "training", 0, 384, 1),
    ("msa-module-4", "training", 1024, 384, 1),
    ("alphafold2", "inference", 128, 2048, 1),
    ("alphafold2", "inference", 128, 2048, 4),
    ("alphafold2-extra", "inference", 5120, 384, 1),
    ("pairformer-48", "inference", 0, 2048, 1),
]


def last_choices(schedule: Sequence) -> Iterator[Strategy]:
    """That which each step's backward is computed from."""
    for part in schedule.parts:
        if isinstance(part, Checkpoint):
            yield from last_choices(part.body)
        else:
            yield part.strategy


def worth_having(table: CostTable) -> Counter[str]:
    """Kinds of the strategies that no other of the step is as good as, steps that cost the same once."""
    distinct = {id(costs): costs for costs in table.options}.values()
    return Counter(cost.strategy.kind for costs in distinct for cost in needed(costs))


def choices(problem: Problem, count: int) -> dict[str, Any]:
    """How often each kind is the last choice, and how many of a kind are worth having."""
    table = cost_problem(problem).table
    frontier = Frontier(table)
    found: Counter[str] = Counter()
    for budget in frontier.budgets(count):
        found.update(strategy.kind for strategy in last_choices(frontier.schedule(budget)))
    return {
        "last_choices": dict(found),
        "worth_having": dict(worth_having(table)),
        "side_by_side": side_by_side(table),
    }


def side_by_side(table: CostTable) -> list[dict[str, Any]]:
    """Of each distinct step, chunks and co-shards in as many pieces: bytes of a backward, seconds of both."""
    rows = []
    for costs in {id(costs): costs for costs in table.options}.values():
        found = {
            cost.strategy.kind: cost
            for cost in costs
            if cost.strategy.n == PIECES and cost.strategy.kernel == EAGER
        }
        if {"chunk", "coshard"} <= found.keys():
            rows.append(
                {
                    kind: {
                        "strategy": str(found[kind].strategy),
                        "backward_bytes": found[kind].backward_bytes,
                        "seconds": found[kind].forward_seconds + found[kind].backward_seconds,
                    }
                    for kind in ("chunk", "coshard")
                }
            )
    return rows


@click.command(help=__doc__)
@click.option("--budgets", type=click.IntRange(2), default=24, show_default=True, help="Of each problem.")
@json_option
def command(budgets: int, json_path: str | None) -> None:
    """A row for each problem."""
    check_writable(json_path=json_path)
    rows = []
    with progress("planning") as told:
        for model, mode, n_seq, n_res, ranks in PROBLEMS:
            shape = InputShape(n_seq or None, n_res)
            problem = Problem(
                model=model, mode=mode, shape=shape, ranks=ranks, config=PRESETS[model].config,
                dtype="bfloat16", device=DEVICE,
            )  # fmt: skip
            on_ranks = f", {ranks} ranks" if ranks > 1 else ""
            name = f"{model} {mode}, {f's={n_seq}, ' if n_seq else ''}r={n_res}{on_ranks}"
            rows.append({"problem": name} | choices(problem, budgets))
            told.done(name)
    if json_path:
        write_json(json_path, rows)
    console = console_for_output(json_path=json_path)
    print_table(_table(rows), console)
    print_table(_beside(rows[1]), console)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = new_table("last choices of steps (of strategies worth having)", "problem", *KINDS)
    for row in rows:
        total = sum(row["last_choices"].values())
        cells = (
            f"{row['last_choices'].get(kind, 0) / total:.1%} ({row['worth_having'].get(kind, 0)})"
            for kind in KINDS
        )
        table.add_row(row["problem"], *cells)
    return table


def _beside(row: dict[str, Any]) -> Table:
    table = new_table(
        f"{row['problem']}: backward, both passes", "chunk", "peak", "time", "co-shard", "peak", "time"
    )
    for pair in row["side_by_side"]:
        cells = [
            (one["strategy"], format_size(one["backward_bytes"]), format_seconds(one["seconds"]))
            for one in (pair["chunk"], pair["coshard"])
        ]
        table.add_row(*cells[0], *cells[1])
    return table


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.strategies")
