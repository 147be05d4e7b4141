"""How close predicted times are: plans along the frontier, run here, beside three sources of times.

    python -m evoplan.experiments.times [--rounds N] [--cache FILE]

Two sizes, seven budgets each from the least feasible up, planned with measured times, run interleaved in one
process. The same schedules are also timed by the calibrated and by the plain roofline. The calibration of
each size is fitted to the other size's measurements: it has to carry over.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from evoplan.cost_model.calibrate import fit
from evoplan.cost_model.machine import local_name
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.times import Measured, Roofline
from evoplan.cost_model.times_cache import Shapes
from evoplan.experiments.interleaved import interleaved
from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig
from evoplan.model.running.chain import Step
from evoplan.planner.checking.profiling import Measurement, profile_problem
from evoplan.planner.checking.trial import Trial, random_inputs, random_stack
from evoplan.planner.commands.flags import REPEATS
from evoplan.planner.commands.terminal import (
    CHECK_FAILED,
    Progress,
    console_for_output,
    progress,
    run_command,
)
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import time_source
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size
from evoplan.planner.solvers import Frontier

RESULTS = Path(__file__).parent / "results" / "times.json"
CASES = [(4, InputShape(64, 96)), (3, InputShape(48, 160))]
SHARES = (0.0, 0.08, 0.16, 0.3, 0.5, 0.75, 1.0)  # of the way from the least budget to the most, logarithmic
TOLERANCE, LEAST_CORRELATION = 0.15, 0.95
MAX_PIECES = 16


class TracedOnly(Measured):
    """Measured times, without kernels that cannot be traced: a roofline knows nothing of them."""

    def opaque(self, step: Step, shapes: Shapes, live_bytes: int) -> list[StepCost]:
        """None."""
        return []


def problem_of(blocks: int, shape: InputShape) -> Problem:
    """AlphaFold 2's widths, dropout off, float32."""
    config = EvoformerConfig(n_block=blocks).with_dropout(0.0)
    return Problem(model="alphafold2", config=config, shape=shape, optimizer="none")


def plans_along(costed: Costed) -> list[Plan]:
    """Plans from the least budget to the one that needs no recompute."""
    budgets = Frontier(costed.table).budgets(101)
    found = []
    for share in SHARES:
        budget = costed.fixed_bytes + budgets[round(share * (len(budgets) - 1))]
        problem = costed.problem.model_copy(update={"budget_bytes": budget})
        found.append(solve(replace(costed, problem=problem)))
    return found


def run_case(costed: Costed, others: dict[str, Costed], rounds: int, say: Progress) -> list[dict[str, Any]]:
    """One size: its plans, predicted from every source, and measured."""
    plans, problem = plans_along(costed), costed.problem
    stack = random_stack(problem, "cpu")
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes())
    trials = {
        str(number): Trial(apply_plan(stack, plan), problem, inputs) for number, plan in enumerate(plans)
    }
    say(f"{problem.shape}: running {len(trials)} plans")
    times = interleaved(
        {name: trial.run for name, trial in trials.items()},
        rounds,
        told=lambda number: say.done(f"{problem.shape}: round {number} of {rounds}"),
    )
    rows = []
    for plan, runs in zip(plans, times.values(), strict=True):
        measured = float(np.median(runs))
        predicted = {"measured": plan.predicted.step_seconds} | {
            name: other.predict(plan.schedule).step_seconds for name, other in others.items()
        }
        rows.append(
            {
                "blocks": problem.config.n_block, "s": problem.shape.n_seq, "r": problem.shape.n_res,
                "peak_bytes": plan.predicted.peak_bytes,
                "measured_seconds": measured,
                "quartiles": [float(np.percentile(runs, q)) for q in (25, 75)],
                "predicted_seconds": predicted,
                "ratios": {name: seconds / measured for name, seconds in predicted.items()},
            }
        )  # fmt: skip
    return rows


@click.command()
@click.option("--rounds", type=REPEATS, default=5, show_default=True, help="Timed runs of each plan.")
@click.option("--repeats", type=REPEATS, default=3, show_default=True, help="Of each step's time.")
@click.option("--cache", type=click.Path(), help="File of measured times; else EVOPLAN_CACHE.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(),
    help="Where the result goes, - for standard output; else experiments/results.",
)
def times(rounds: int, repeats: int, cache: str | None, json_path: str | None) -> None:
    """Predicted beside measured step times; 1 if one is off by more than 15 % or the order is wrong."""
    check_writable(json_path=json_path or RESULTS, reads=(cache,))
    console = console_for_output(json_path=json_path)
    problems = [problem_of(*case) for case in CASES]
    with progress("measuring") as say:
        steps = []
        for problem in problems:
            steps.append(profile_problem(problem, cache, repeats, MAX_PIECES, progress=say)[0])
            say.done(f"{problem.shape}: steps measured")
        everything = []
        for number, problem in enumerate(problems):
            source = time_source(problem, "measured", cache)
            assert isinstance(source, Measured)  # which a profile has just been made for
            costed = cost_problem(problem, times=TracedOnly(source.cache, source.beside))
            elsewhere = [row for other, rows in enumerate(steps) if other != number for row in rows]
            everything += run_case(costed, _other_sources(costed, elsewhere), rounds, say)
    table = new_table(
        "step times", "blocks", "s", "r", "peak", "measured", "quartiles",
        "by measured times", "calibrated elsewhere", "roofline",
    )  # fmt: skip
    for row in everything:
        low, high = row["quartiles"]
        table.add_row(
            *(str(row[key]) for key in ("blocks", "s", "r")),
            format_size(row["peak_bytes"]),
            format_seconds(row["measured_seconds"]),
            f"{low:.2f}-{high:.2f} s",
            *(f"{ratio:.3f}" for ratio in row["ratios"].values()),
        )
    print_table(table, console, keys=4)
    summary = {name: _summary(everything, name) for name in everything[0]["ratios"]}
    for name, found in summary.items():
        console.print(
            f"{name}: off by at most {found['largest_error']:.1%}, half within {found['median_error']:.1%}; "
            f"order of plans: Spearman {', '.join(f'{rho:.3f}' for rho in found['spearman'])}",
            highlight=False,
        )
    write_json(
        json_path or RESULTS,
        {"torch": torch.__version__, "device": local_name("cpu"), "summary": summary, "runs": everything},
    )
    kept = summary["measured"]
    good = kept["largest_error"] <= TOLERANCE and min(kept["spearman"]) >= LEAST_CORRELATION
    sys.exit(0 if good else CHECK_FAILED)


def _other_sources(costed: Costed, elsewhere: list[Measurement]) -> dict[str, Costed]:
    """The same problem timed by a roofline: calibrated at the other size, and as the device table has it."""
    problem, device = costed.problem, costed.device
    rows = [pair for row in elsewhere for pair in row.pairs()]
    calibrated = fit(rows, device, problem.dtype).applied(device, problem.dtype)
    return {
        "calibrated": cost_problem(problem, times=Roofline(calibrated, problem.dtype, name="calibrated")),
        "roofline": cost_problem(problem),
    }


def _summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    errors = [abs(row["ratios"][name] - 1) for row in rows]
    sizes = dict.fromkeys((row["s"], row["r"]) for row in rows)
    correlations = []
    for size in sizes:
        own = [row for row in rows if (row["s"], row["r"]) == size]
        predicted = [row["predicted_seconds"][name] for row in own]
        correlations.append(float(spearmanr(predicted, [row["measured_seconds"] for row in own]).statistic))
    return {
        "largest_error": max(errors),
        "median_error": float(np.median(errors)),
        "spearman": correlations,
    }


if __name__ == "__main__":
    run_command(times, "python -m evoplan.experiments.times")
