"""The plan of one of our own models, as its file has it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from evoplan.planner.arguments import check_kinds
from evoplan.planner.plans.sealed import Reader, Sealed, has_state_away
from evoplan.planner.problems.prediction import Bytes, Prediction, Seconds
from evoplan.planner.problems.problem import Name, Problem
from evoplan.planner.schedules.offload import waits
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.schedules.text import schedule_of, schedule_to_json
from evoplan.planner.sizes import format_seconds

SCHEMA: Literal[2] = 2  # 1 did not name the model's family
STATIC = {"parameters", "gradients", "optimizer", "inputs", "outputs", "workspace"}
TIMES = ("measured", "calibrated", "roofline")


class Certificate(BaseModel):
    """A proof that no schedule of a class is faster than a bound.

    For persistent schedules memory is as the dynamic program charges it, which is up to two states more than
    the replay finds: a schedule that fits by the replay alone may be faster. For all others, as the replay.

    Attributes:
        method: who proves it.
        max_depth: the class: persistent schedules (what is kept is kept until it is used) with
            checkpoints nested at most so deep; None for any depth.
        persistent: False: the class is every schedule of the strategies on offer, in whichever order they run
            and whatever they drop and make again.
        waits: what the first pass keeps may wait in host memory, each part's while the next one runs.
        bound_seconds: none of them is faster within the budget; None: none of them fits.
        best_seconds: the fastest one known; None: none is known.
        gap: best_seconds / bound_seconds - 1, a share.
        seconds: that the proof took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Name
    max_depth: Annotated[int, Field(ge=0)] | None
    persistent: bool = True
    waits: bool = False
    bound_seconds: Seconds | None
    best_seconds: Seconds | None
    gap: Seconds | None
    seconds: Seconds

    def in_words(self) -> str:
        """What is proven, in a sentence."""
        nested = {None: "nested to any depth", 0: "not used", 1: "at most one deep"}
        depths = nested.get(self.max_depth, f"at most {self.max_depth} deep")
        of = f"certificate ({self.method}): persistent schedules, checkpoints {depths}, as charged by dp: "
        if not self.persistent:
            of = f"certificate ({self.method}): every schedule, persistent or not: "
        if self.waits:
            of = (
                f"certificate ({self.method}): persistent schedules, checkpoints {depths}, what a part of "
                "the first pass keeps waiting in host memory or not, as charged by dp: "
            )
        if self.bound_seconds is None:
            return f"{of}none fits this budget (proved in {format_seconds(self.seconds)})"
        proved = f"none is faster than {format_seconds(self.bound_seconds)}"
        best = "none is known to fit"
        if self.best_seconds is not None:
            best = f"the best known takes {format_seconds(self.best_seconds)}"
            best += f", a gap of {self.gap:.2%}" if self.gap is not None else ""
        return f"{of}{proved}; {best} (proved in {format_seconds(self.seconds)})"


class SolverReport(BaseModel):
    """Who found the schedule, how long it took, and how far from optimal it may be.

    Attributes:
        gap: the step is at most so much slower than the fastest persistent schedule, checkpoints nested
            to any depth, memory as the dynamic program charges it; None: not proven. In inference: than any
            schedule of the strategies and waits on offer.
        certificates: what is proven, class by class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    seconds: Seconds
    gap: Seconds | None = None
    certificates: tuple[Certificate, ...] = ()


class Plan(Sealed):
    """A problem and the schedule that answers it.

    Attributes:
        problem: model, shapes, device and budget.
        costs: where memory and time figures came from.
        solver: who found the schedule, and what is proven of it.
        predicted: bytes and seconds of a step; of the rank that needs the most memory, where there are
            several; times are the first one's.
        rank_peak_bytes: predicted peak of each rank.
        schedule: in the file, nested parts; see `schedule_to_json`.
        static: the parts of predicted.static_bytes.
        model_digest: of the model that was costed (`planner.problems.digest`).
        baselines: the same prediction for what people do by hand.
        least_feasible_bytes: the least budget that has a plan; None: not known.
        only_whole: kinds of steps that offer no strategy in pieces.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["evoplan-plan"] = "evoplan-plan"
    schema_version: Literal[2] = SCHEMA
    problem: Problem
    costs: dict[Name, Name]
    solver: SolverReport
    predicted: Prediction
    rank_peak_bytes: tuple[Bytes, ...] = ()
    static: dict[Name, Bytes]
    baselines: dict[Name, Prediction]
    least_feasible_bytes: Bytes | None
    only_whole: tuple[Name, ...] = ()
    model_digest: Name | None = None
    schedule: Annotated[Sequence, PlainValidator(schedule_of), PlainSerializer(schedule_to_json)]

    @model_validator(mode="after")
    def _complete(self) -> Plan:
        for name, needed in (("costs", {"memory", "time"}), ("static", STATIC), ("baselines", {"none"})):
            missing = needed - set(getattr(self, name))
            if missing:
                raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        ranks, peaks = self.problem.ranks, len(self.rank_peak_bytes)
        if peaks != ranks and (peaks or ranks > 1):  # plans for one rank once had none
            raise ValueError(f"rank_peak_bytes has {peaks} entries, problem.ranks is {ranks}")
        if peaks and max(self.rank_peak_bytes) != self.predicted.peak_bytes:
            raise ValueError("predicted.peak_bytes is not the largest of rank_peak_bytes")
        if (
            set(self.static) - {"reserve"} != STATIC
            or sum(self.static.values()) != self.predicted.static_bytes
        ):
            raise ValueError("static is not the parts of predicted.static_bytes")
        if self.costs["time"] not in TIMES:
            raise ValueError(f"costs.time is {self.costs['time']!r}; there are: {', '.join(TIMES)}")
        return self


def check_plan(plan: object) -> None:
    """ValueError where it is no plan of one of our own models."""
    give = "what make_plan or load_plan returns; a plan of evoplan.fit goes to evoplan.fit(..., plan=plan)"
    check_kinds(plan=(plan, Plan, give))


def _check(plan: Plan) -> None:
    if plan.problem.training and has_state_away(plan.schedule):
        raise ValueError("it has state in host memory while steps run, which training cannot")
    if waits(plan.schedule) != bool(plan.predicted.host_bytes):
        raise ValueError("predicted.host_bytes is not what its schedule lets wait in host memory")
    if plan.predicted.host_bytes > (plan.problem.host_bytes or 0):
        raise ValueError("more is to wait in host memory than the problem has of it")


_READER = Reader(Plan, "evoplan-plan", SCHEMA, "`evoplan plan --out`", _check)


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan file, as `evoplan plan --out` and `plan.save(path)` write it.

    Args:
        path: of the file, JSON.

    Raises:
        PlanFileError: missing, cut off, altered, of another schema, or not a plan.
    """
    return _READER.load(path)
