"""Random problems, planned, run and held against their promises: memory, loss and every gradient.

    python -m evoplan.experiments.fuzz [--cases N] [--minutes M] [--seed S]
    python -m evoplan.experiments.fuzz --case SEED:INDEX

Each case draws a model, precision, sizes, masks, layouts of inputs, what is trained, what the loss reads, and
a budget (`fuzz_cases`). Its plan is made and applied as a user would, a step's peak is measured on the CPU
allocator, and loss and gradients are compared with the model without a plan. What counts as a fault:

- the measured peak is above the budget or above the predicted peak, which a budget may equal;
- the least budget has no plan, or one byte less has one;
- a loss or a gradient is wrong, or is there in one model and not in the other;
- anything is raised, except NoPlanError below the least budget.

Inputs without gradient are predicted as if they had one: such plans measure below their prediction.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from statistics import median_high
from typing import Any

import click
import torch

from evoplan.cost_model import measure
from evoplan.experiments.fuzz_cases import FAMILY, Case, draw_case, draw_family, squares
from evoplan.experiments.fuzz_steps import FuzzStep, difference
from evoplan.planner.commands.terminal import CHECK_FAILED, progress, run_command
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.files import STDOUT, check_writable, write_json
from evoplan.planner.plans.making import make_plan
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import Costed
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.sizes import exact_size

COMMAND = "python -m evoplan.experiments.fuzz"
EVERY = 50  # cases for each line of progress
FAULTS = ("over budget", "wrong", "crash")
Say = Callable[[str], object]


@dataclass(frozen=True)
class Fault:
    """A promise that was not kept, and the command that shows it again."""

    kind: str
    what: str
    repeat: str


@dataclass
class Found:
    """What some cases came to.

    Attributes:
        ratios: measured over predicted peaks, and each case's index.
        refused: budgets below the least, as they should be.
        overflows: cases in which some of the plain model's own numbers do; the others are compared.
    """

    cases: int = 0
    ratios: list[tuple[float, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    refused: int = 0
    overflows: int = 0

    @property
    def counts(self) -> Counter[str]:
        """Faults by kind."""
        return Counter(fault.kind for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self) | {"ratios": {name: ratio for name, (ratio, _) in self.spread.items()}}

    @property
    def spread(self) -> dict[str, tuple[float, int]]:
        """Least, median and largest of the ratios, and whose they are; empty if there are none."""
        choices: dict[str, Callable[[list[tuple[float, int]]], tuple[float, int]]]
        choices = {"least": min, "median": median_high, "most": max}
        return {name: choose(self.ratios) for name, choose in choices.items() if self.ratios}


@dataclass(frozen=True)
class Costs:
    """A family's costs, and the range of its budgets in bytes."""

    costed: Costed
    least: int
    most: int

    def plan(self, budget: int | None) -> Plan:
        """The plan for a budget."""
        problem = self.costed.problem.model_copy(update={"budget_bytes": budget})
        return solve(replace(self.costed, problem=problem))


@lru_cache(maxsize=1)
def costs_of(seed: int, number: int) -> Costs:
    """Trace a family of problems."""
    family = draw_family(seed, number)
    loss = squares if family.own_loss else None
    costed = cost_with_times(family.problem, "roofline", stack=family.stack(), only=family.offer, loss=loss)
    costs = Costs(costed, 0, 0)
    try:
        costs.plan(1)
    except NoPlanError as error:
        return Costs(costed, error.least_feasible_bytes, costs.plan(None).predicted.peak_bytes)
    raise AssertionError("a plan for one byte")


class Check:
    """One case, step by step; what is found goes into `found`."""

    def __init__(self, case: Case, found: Found) -> None:
        self.case, self.found = case, found

    def run(self) -> None:
        """All of it."""
        self.found.cases += 1
        try:
            plan = self._plan()
            if plan is not None:
                self._apply(plan)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            self._fault("crash", f"{type(error).__name__}: {text} ({where.name}, line {where.lineno})")

    def _fault(self, kind: str, what: str) -> None:
        case = self.case
        self.found.faults.append(Fault(kind, what, f"{COMMAND} --case {case.seed}:{case.index}"))

    def _plan(self) -> Plan | None:
        case = self.case
        costs = costs_of(case.seed, case.family.number)
        between = costs.least + round(case.share * (costs.most - costs.least))
        budgets = {"least": costs.least, "between": between, "unlimited peak": costs.most, "none": None}
        budget = budgets.get(case.budget, costs.most + costs.most // 2)
        if case.budget == "least":
            try:
                plan = costs.plan(costs.least - 1)
                self._fault("over budget", f"a plan below the least, {exact_size(costs.least)}")
            except NoPlanError:
                self.found.refused += 1
        try:
            plan = costs.plan(budget)
        except NoPlanError as error:
            self._fault("over budget", f"no plan for a budget {case.budget}: {error}")  # which has sizes
            return None
        if case.family.offer is None and case.index % FAMILY == 0:
            self._compare_with_users(plan)
        return plan

    def _compare_with_users(self, plan: Plan) -> None:
        """Costs are traced once for a family: a plan made by the public function is the same."""
        family, inputs = self.case.family, self.case.inputs()
        theirs = make_plan(
            self.case.model(),
            family.in_order(inputs),
            plan.problem.budget_bytes,
            mode=plan.problem.mode,
            optimizer=plan.problem.optimizer,
            times="roofline",
            autocast=getattr(torch, plan.problem.autocast) if plan.problem.autocast else None,
            loss=squares if family.own_loss else None,
            donate=plan.problem.donate,
        )
        if (theirs.problem, theirs.schedule) != (plan.problem, plan.schedule):
            self._fault("wrong", f"make_plan makes another plan: {theirs.problem} for {plan.problem}")

    def _apply(self, plan: Plan) -> None:
        case = self.case
        model, inputs = case.model(), case.inputs()
        planned = FuzzStep(case, apply_plan(model, plan), inputs)
        self._compare_numbers(FuzzStep(case, model, inputs), planned)
        planned.prepare()
        planned.run()
        live = planned.live_bytes() + plan.static["optimizer"] + plan.static["workspace"]
        peak, predicted = live + measure.peak_bytes(planned.run), plan.predicted.peak_bytes
        self.found.ratios.append((peak / predicted, case.index))
        budget = plan.problem.budget_bytes
        for name, limit in (("budget", budget), ("predicted peak", predicted)):
            if limit is not None and peak > limit:
                ratio = f"{peak / limit:.4f}"
                self._fault("over budget", f"peak {exact_size(peak)}, {name} {exact_size(limit)}: {ratio}")
                break

    def _compare_numbers(self, plain: FuzzStep, planned: FuzzStep) -> None:
        expected, got = plain.results(), planned.results()
        self.found.overflows += not expected.finite
        what = difference(expected, got, self.case.family.problem.precision, plain)
        if what is not None:
            self._fault("wrong", what)


def fuzz(seed: int, cases: int | None, minutes: float | None, tell: Say, progressed: Say) -> Found:
    """Run cases by their index until there are as many, or the time is over."""
    found, start = Found(), time.monotonic()
    gc.collect()
    gc.freeze()  # every measurement collects garbage: not that of all modules
    while found.cases != cases and (minutes is None or time.monotonic() - start < 60 * minutes):
        known = len(found.faults)
        Check(draw_case(seed, found.cases), found).run()
        for fault in found.faults[known:]:
            tell(f"{fault.kind}: {fault.what}; repeat with: {fault.repeat}")
        progressed(f"{found.cases} cases, {len(found.faults)} faults, {time.monotonic() - start:.0f} s")
    return found


def report(found: Found, seconds: float, tell: Say) -> None:
    """The figures, for people."""
    counts = found.counts
    tell(
        f"{found.cases} cases, {seconds / max(found.cases, 1):.2f} s each: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in FAULTS)
        + f"; {found.refused} budgets below the least refused; in {found.overflows} cases some numbers "
        "overflow without a plan, too"
    )
    said = (f"{name} {ratio:.4f} (case {index})" for name, (ratio, index) in found.spread.items())
    tell(f"measured / predicted peak: {', '.join(said)}")
    if found.faults:
        tell(f"repeat the first fault with: {found.faults[0].repeat}")


def _case_number(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    seed, colon, index = value.partition(":")
    if not (colon and seed.isdecimal() and index.isdecimal()):
        raise click.BadParameter(f"{value!r} is no case; write SEED:INDEX like 0:17", ctx, param)
    return int(seed), int(index)


def _lines(text: str) -> None:
    """Where there is no terminal: a line for every so many cases."""
    if int(text.split()[0]) % EVERY == 0:
        click.echo(text, err=True)


@click.command()
@click.option("--cases", type=click.IntRange(1), help="How many; 100 if neither this nor --minutes is given.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop after so much time.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--case", "one", callback=_case_number, metavar="SEED:INDEX", help="Run this case alone.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(),
    help="Also write the figures to this file; - is standard output.",
)
def command(
    cases: int | None,
    minutes: float | None,
    seed: int,
    one: tuple[int, int] | None,
    json_path: str | None,
) -> None:
    """Plan and run random problems; exit code 1 if any promise is not kept."""
    check_writable(json_path=json_path)
    tell = partial(click.echo, err=json_path == STDOUT)
    start = time.monotonic()
    if one is not None:
        if cases or minutes:
            raise click.UsageError("--case runs one case: leave --cases and --minutes out")
        found, case = Found(), draw_case(*one)
        tell(str(case))
        Check(case, found).run()
        for fault in found.faults:
            tell(f"{fault.kind}: {fault.what}")
    else:
        cases = 100 if cases is None and minutes is None else cases
        if sys.stderr.isatty():
            with progress("drawing") as say:
                found = fuzz(seed, cases, minutes, tell, say)
        else:
            found = fuzz(seed, cases, minutes, tell, _lines)
    seconds = time.monotonic() - start
    report(found, seconds, tell)
    if json_path:
        write_json(
            json_path, {"torch": torch.__version__, "seed": seed, "seconds": seconds, **found.to_json()}
        )
    if found.faults:
        sys.exit(CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, COMMAND)
