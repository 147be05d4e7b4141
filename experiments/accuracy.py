"""How close predictions are: predicted against the allocator's measured peak, over a grid of plans.

    python -m evoplan.experiments.accuracy [PRECISION ...]

Sizes that do not divide, one to eight blocks, two dtypes and mixed precision, dropout on and off, an extra
MSA stack, alone or before the main one, TinyOpenFold; four to six budgets each from the least feasible up.
Ratios are of activations: static bytes are excluded from both sides. Precisions named are all that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.families import EvoformerConfig, TinyOpenFoldConfig, TrunkConfig
from evoplan.planner.checking.verify import verify_plan
from evoplan.planner.commands.terminal import CHECK_FAILED, console_for_output, progress, run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import AUTOCAST, Problem
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.sizes import format_size
from evoplan.planner.solvers import Frontier

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
NARROW = EvoformerConfig(c_m=64, c_z=64)
WIDE = EvoformerConfig()
EXTRA = EvoformerConfig(n_block=2, c_m=32, c_z=64, c_head_msa=8, column_attention="global")
TINY = TinyOpenFoldConfig(c_m=32, c_z=48, c_opm=16)
# Budgets as shares of the way from the least to the most, on a logarithmic scale.
SPREAD, DEEP = (0.0, 0.3, 0.6, 0.9), (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)
# Configuration, blocks, shape, precision, dropout, shares; on DEEP checkpoints nest.
Case = tuple[ModelConfig, int, InputShape, str, bool, tuple[float, ...]]
GRID: list[Case] = [
    (NARROW, 1, InputShape(29, 31), "float32", True, SPREAD),
    (NARROW, 4, InputShape(19, 29), "float32", False, SPREAD),
    (NARROW, 6, InputShape(13, 23), "float32", True, SPREAD),
    (WIDE, 2, InputShape(9, 19), "float32", False, SPREAD),
    (NARROW, 2, InputShape(23, 31), "bfloat16", True, SPREAD),
    (NARROW, 5, InputShape(17, 27), "bfloat16", False, SPREAD),
    (NARROW, 4, InputShape(19, 29), "float32", True, DEEP),
    (NARROW, 8, InputShape(13, 23), "float32", False, DEEP),
    (TrunkConfig(EXTRA, NARROW), 4, InputShape(11, 19, n_extra=37), "float32", True, SPREAD),
    (NARROW, 1, InputShape(29, 31), "bf16-mixed", True, SPREAD),
    (NARROW, 4, InputShape(19, 29), "bf16-mixed", False, SPREAD),
    (WIDE, 1, InputShape(9, 19), "bf16-mixed", True, SPREAD),
    (EXTRA, 2, InputShape(67, 23), "bf16-mixed", True, SPREAD),
    (TINY, 2, InputShape(7, 21, 2), "bf16-mixed", True, SPREAD),
    (TINY, 4, InputShape(5, 19), "bf16-mixed", True, SPREAD),
]


def rows(case: Case) -> list[dict[str, Any]]:
    """The plans of one case, measured."""
    config, blocks, shape, dtype, dropout, shares = case
    config = config.with_blocks(blocks)
    config = config if dropout else config.with_dropout(0.0)
    how: dict[str, Any] = {"mixed": dtype} if dtype in AUTOCAST else {"dtype": dtype}
    problem = Problem(model="custom", config=config, shape=shape, **how)
    c_m = config.state_shapes(shape)["m"][-1]
    costed = cost_problem(problem)
    budgets = Frontier(costed.table).budgets(101)
    found = []
    for share in shares:
        budget = costed.fixed_bytes + budgets[round(share * (len(budgets) - 1))]
        asked = replace(costed, problem=problem.model_copy(update={"budget_bytes": budget}))
        plan = solve(asked)
        result = verify_plan(None, plan, repeats=1)
        predicted = result.predicted_peak_bytes - result.static_bytes
        measured = result.measured_peak_bytes - result.static_bytes
        found.append(
            {
                "blocks": blocks, "c_m": c_m, "s": shape.n_seq, "r": shape.n_res, "extra_s": shape.n_extra,
                "dtype": dtype, "dropout": dropout,
                "depth": depth(plan.schedule),
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "ratio": measured / predicted,
                "max_gradient_error": result.max_gradient_error,
            }
        )  # fmt: skip
    return found


@click.command(help=__doc__)
@click.argument("precisions", nargs=-1, type=click.Choice(list(dict.fromkeys(case[3] for case in GRID))))
def command(precisions: tuple[str, ...]) -> None:
    """Print the table, write it as JSON; exit code 1 unless every ratio lies in 0.98 to 1."""
    sys.exit(main(precisions))


def main(only: Sequence[str] = ()) -> int:
    """The same; returns the exit code.

    Args:
        only: precisions; all if none is given, and only then it is written.
    """
    check_writable(RESULTS)
    console = console_for_output()
    table = new_table(
        "activations, predicted and measured",
        "blocks",
        "c_m",
        "s",
        "r",
        "dtype",
        "dropout",
        "depth",
        "predicted",
        "measured",
        "ratio",
        "gradients",
    )
    everything = []
    with progress("measuring") as say:
        for case in [case for case in GRID if not only or case[3] in only]:
            about = f"{case[1]} blocks, {case[2]}, {case[3]}"
            say(about)
            for row in rows(case):
                everything.append(row)
                predicted, measured = (
                    format_size(row[f"{which}_bytes"]) for which in ("predicted", "measured")
                )
                say.done(f"{about}: predicted {predicted}, measured {measured}")
                table.add_row(
                    *(str(row[key]) for key in ("blocks", "c_m", "s", "r", "dtype", "dropout", "depth")),
                    predicted, measured, f"{row['ratio']:.4f}", f"{row['max_gradient_error']:.1e}",
                )  # fmt: skip
    print_table(table, console, keys=7)
    ratios = [row["ratio"] for row in everything]
    nested = sum(row["depth"] >= 2 for row in everything)
    console.print(
        f"{len(ratios)} runs, {nested} of them nested two deep or more; "
        f"measured / predicted from {min(ratios):.4f} to {max(ratios):.4f}"
    )
    if not only:
        write_json(RESULTS, {"torch": torch.__version__, "backend": "cpu-allocator", "runs": everything})
    return 0 if min(ratios) >= 0.98 and max(ratios) <= 1 else CHECK_FAILED


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.accuracy")
