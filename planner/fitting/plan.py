"""The plan of a model that was written elsewhere, as its file has it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator

from evoplan.cost_model.devices import DTYPES
from evoplan.model.running.strategy import Strategy
from evoplan.planner.plans.plan import TIMES, SolverReport
from evoplan.planner.plans.sealed import Reader, Sealed, has_state_away
from evoplan.planner.problems.prediction import Bytes, Prediction
from evoplan.planner.problems.problem import Name, Optimizer, OwnDevice
from evoplan.planner.schedules.offload import waits
from evoplan.planner.schedules.schedule import Sequence, shape_of, strategies_used
from evoplan.planner.schedules.text import schedule_of, schedule_to_json
from evoplan.planner.sizes import exact_size

SCHEMA: Literal[1] = 1


class FitPlan(Sealed):
    """How a model's blocks are run.

    Attributes:
        model: its class.
        budget_bytes: of the peak of a whole step; None: no limit.
        least_feasible_bytes: the least budget that has a plan.
        solver: who found the schedule, and what is proven of it.
        schedule: of its blocks' calls, in order.
        chain_digest: of its blocks' calls: what they are given, and what they do.
        blocks: the calls by name, in order.
        own_device: the device itself where the table does not have it.
        precision: what products are done in.
        loss: what the peak holds for, by name.
        costs: where memory and time figures came from.
        predicted: of the whole step: the model's own code around its blocks, head and loss included.
        static: the parts of predicted.static_bytes.
        baselines: the same for what people do by hand: nothing recomputed (`none`), every block (`large`).
        notes: what is left as it is written, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["evoplan-fit"] = "evoplan-fit"
    schema_version: Literal[1] = SCHEMA
    model: Name
    chain_digest: Name
    blocks: tuple[Name, ...]
    device: Name
    precision: Name
    optimizer: Optimizer
    loss: Name
    budget_bytes: Annotated[Bytes, Field(ge=1)] | None
    costs: dict[Name, Name]
    solver: SolverReport
    predicted: Prediction
    static: dict[Name, Bytes]
    baselines: dict[Name, Prediction]
    least_feasible_bytes: Bytes
    own_device: OwnDevice = None
    notes: tuple[Annotated[str, Field(max_length=1000)], ...] = ()
    schedule: Annotated[Sequence, PlainValidator(schedule_of), PlainSerializer(schedule_to_json)]

    def report(self) -> str:
        """The plan in words."""
        none, large = self.baselines["none"], self.baselines["large"]
        rows = [
            f"{self.model}: {len(self.blocks)} blocks ({self.blocks[0]} ...), {self.precision}",
            "budget    " + ("none" if self.budget_bytes is None else exact_size(self.budget_bytes)),
            f"predicted {exact_size(self.predicted.peak_bytes)}, of which "
            f"{exact_size(self.predicted.static_bytes)} static; {self.predicted.step_seconds:.3g} s",
            f"unplanned {exact_size(none.peak_bytes)}; {none.step_seconds:.3g} s",
            f"per block {exact_size(large.peak_bytes)}; {large.step_seconds:.3g} s (each block checkpointed)",
            f"least     {exact_size(self.least_feasible_bytes)}",
            f"schedule  {shape_of(self.schedule)}  (s: a step, [..]: a checkpoint)",
            *(one.in_words() for one in self.solver.certificates),
            *(f"run as    {count} x {strategy}" for strategy, count in self._strategies()),
            *(f"note      {note}" for note in self.notes),
        ]
        return "\n".join(rows)

    @property
    def strategies(self) -> set[Strategy]:
        """All that blocks run under."""
        return set().union(*strategies_used(self.schedule).values())

    def _strategies(self) -> list[tuple[str, int]]:
        """Those that blocks run under, and how many do: one that is recomputed may run under two."""
        used = strategies_used(self.schedule).values()
        return Counter(str(strategy) for strategies in used for strategy in strategies).most_common()


def _check(plan: FitPlan) -> None:
    if len(plan.schedule.span) != len(plan.blocks):
        raise ValueError(f"it covers {len(plan.schedule.span)} steps, the model has {len(plan.blocks)}")
    if has_state_away(plan.schedule) or waits(plan.schedule) or plan.predicted.host_bytes:
        raise ValueError("it has something in host memory, which blocks of a fitted model cannot")
    if sum(plan.static.values()) != plan.predicted.static_bytes:
        raise ValueError("static is not the parts of predicted.static_bytes")
    if plan.budget_bytes is not None and plan.predicted.peak_bytes > plan.budget_bytes:
        raise ValueError("predicted.peak_bytes is more than budget_bytes")
    if plan.own_device is not None and plan.device != plan.own_device.name:
        raise ValueError("device is not the name of own_device")
    dtype, *mixed = plan.precision.split(" ")
    if dtype not in DTYPES or mixed not in ([], ["mixed"]):
        raise ValueError(f"precision is {plan.precision!r:.60}; it is a dtype, or one and mixed")
    for name, needed in (("baselines", {"none", "large"}), ("costs", {"memory", "time"})):
        missing = needed - set(getattr(plan, name))
        if missing:
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    if plan.costs["time"] not in TIMES:
        raise ValueError(f"costs.time is {plan.costs['time']!r}; there are: {', '.join(TIMES)}")


def is_fit_plan(path: str | Path) -> bool:
    """Whether a file says that it is one."""
    return _READER.wrote(path)


_READER = Reader(FitPlan, "evoplan-fit", SCHEMA, "`evoplan.fit(...).plan.save(path)`", _check)


def load_fit_plan(path: str | Path) -> FitPlan:
    """Read and check a plan file of `evoplan.fit`.

    Raises:
        PlanFileError: missing, cut off, altered, of another schema, or not such a plan.
    """
    return _READER.load(path)
