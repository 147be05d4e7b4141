"""The plan file: one JSON document, validated on load. No pickles, no code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from evoplan.model.running.strategy import Strategy
from evoplan.planner.files import write_json
from evoplan.planner.problems.prediction import Bytes, Prediction, Seconds
from evoplan.planner.problems.problem import Name, Problem
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, all_runs, allow_depth, depth

SCHEMA: Literal[2] = 2  # 1 did not name the model's family
STATIC = {"parameters", "gradients", "optimizer", "inputs", "outputs", "workspace"}


TIMES = ("measured", "calibrated", "roofline")
LONGEST_STRATEGY = 100  # characters
MOST_CHARACTERS = 64 * 2**20  # of a plan file; a thousand blocks take one


def schedule_to_json(schedule: Sequence) -> list[Any]:
    """Parts in order: [step, "strategy"], or {"checkpoint": parts, "discard": ["strategy", ...]}.

    A step with state in host memory has a third element, the tensors' names: [3, "whole", ["z"]].
    """
    return [
        [part.step, str(part.strategy), *([list(part.away)] if part.away else [])]
        if isinstance(part, Run)
        else {"checkpoint": schedule_to_json(part.body), "discard": [str(s) for s in part.discard]}
        for part in schedule.parts
    ]


def schedule_from_json(parts: list[Any]) -> Sequence:
    """The inverse of `schedule_to_json`; ValueError says what is wrong."""
    built: list[Run | Checkpoint] = []
    for part in parts:
        match part:
            case [bool(), *_]:
                raise ValueError(f"{_short(part)} is no part of a schedule")
            case [int(step), str(strategy)]:
                built.append(Run(step, _strategy(strategy)))
            case [int(step), str(strategy), [*away]] if away and all(isinstance(n, str) for n in away):
                built.append(Run(step, _strategy(strategy), tuple(away)))
            case {"checkpoint": list(body), "discard": list(discard)}:
                strategies = tuple(map(_strategy, discard))
                built.append(Checkpoint(schedule_from_json(body), strategies))
            case _:
                raise ValueError(f"{_short(part)} is no part of a schedule")
    return Sequence(tuple(built))


def _strategy(text: Any) -> Strategy:
    if not isinstance(text, str) or len(text) > LONGEST_STRATEGY:
        raise ValueError(f"{_short(text)} is no strategy")
    return Strategy.parse(text)


def _schedule_of(value: Any) -> Sequence:
    """A schedule, or what a file has of one."""
    if isinstance(value, Sequence):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{_short(value)} is no list of parts")
    return schedule_from_json(value)


def _short(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class PlanFileError(ValueError):
    """A plan file that cannot be used; the message is one line that names it."""


class Certificate(BaseModel):
    """A proof that no schedule of a class is faster than a bound.

    Memory is as the dynamic program charges it, which is up to two states more than the replay finds: a
    schedule that fits by the replay alone may be faster.

    Attributes:
        method: who proves it.
        max_depth: the class: persistent schedules (what is kept is kept until it is used) with
            checkpoints nested at most so deep; None for any depth.
        bound_seconds: none of them is faster within the budget; None: none of them fits.
        best_seconds: the fastest one known; None: none is known.
        gap: best_seconds / bound_seconds - 1.
        seconds: that the proof took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Name
    max_depth: Annotated[int, Field(ge=0)] | None
    bound_seconds: Seconds | None
    best_seconds: Seconds | None
    gap: Seconds | None
    seconds: Seconds


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


class Plan(BaseModel):
    """A problem and the schedule that answers it.

    Attributes:
        costs: where memory and time figures came from.
        predicted: of the rank that needs the most memory, where there are several; times are the first one's.
        rank_peak_bytes: predicted peak of each rank.
        schedule: in the file, nested parts; see `schedule_to_json`.
        static: the parts of predicted.static_bytes.
        model_digest: of the model that was costed (`planner.problems.digest`).
        baselines: the same prediction for what people do by hand.
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
    schedule: Annotated[Sequence, PlainValidator(_schedule_of), PlainSerializer(schedule_to_json)]

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

    def to_json(self) -> dict[str, Any]:
        """The document, sealed with a digest of its content."""
        # The schedule by itself: it may be nested deeper than pydantic goes.
        document = self.model_dump(mode="json", exclude={"schedule"})
        document["schedule"] = schedule_to_json(self.schedule)
        return {**document, "digest": _digest(document)}

    @property
    def identity(self) -> dict[str, str]:
        """What ranks compare to see that they have the same plan."""
        return {"plan": self.to_json()["digest"][:12]}

    def save(self, path: str | Path) -> None:
        """Write the plan, all of it or nothing."""
        write_json(path, self.to_json())


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan file.

    Raises:
        PlanFileError: missing, cut off, altered, of another schema, or not a plan.
    """
    document = _read(path)
    if not isinstance(document, dict) or document.get("format") != "evoplan-plan":
        raise PlanFileError(f"{path}: not a plan file; make one with `evoplan plan --out`")
    schema = document.get("schema_version")
    if schema != SCHEMA or not isinstance(schema, int) or isinstance(schema, bool):
        raise PlanFileError(
            f"{path}: plan schema {_short(schema)}, this version reads {SCHEMA}; "
            "make it again with `evoplan plan --out`"
        )
    try:
        digest = document.pop("digest", None)
        if digest != _digest(document):
            raise PlanFileError(f"{path}: altered since it was made; make it again with `evoplan plan --out`")
        return _checked(document)
    except PlanFileError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6]) + ": " if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise PlanFileError(f"{path}: {where}{message}; make it again with `evoplan plan --out`") from None
    except (ValueError, RecursionError) as error:
        raise PlanFileError(f"{path}: schedule: {error}; make it again with `evoplan plan --out`") from None


def _read(path: str | Path) -> Any:
    """What the file holds."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS)
            if file.read(1):
                raise PlanFileError(f"{path}: too long for a plan file; make one with `evoplan plan --out`")
        return json.loads(text)
    except OSError as error:
        raise PlanFileError(
            f"{path}: cannot be read ({error.strerror}); make it with `evoplan plan --out`"
        ) from None
    except json.JSONDecodeError as error:
        raise PlanFileError(
            f"{path}: cut off or not JSON (line {error.lineno}); make it again with `evoplan plan --out`"
        ) from None
    except PlanFileError:
        raise
    except (ValueError, RecursionError):  # no text, numbers of thousands of digits, nested too deep
        raise PlanFileError(f"{path}: not a plan file; make one with `evoplan plan --out`") from None


def _checked(document: dict[str, Any]) -> Plan:
    """The plan that a document holds; ValueError or RecursionError where it holds none."""
    parts = document.get("schedule")
    if not isinstance(parts, list):
        raise ValueError(f"{_short(parts)} is no list of parts")
    # By JSON's own types: a number in quotes is none. The schedule is checked by itself: it may be nested
    # deeper than the validation's own parser goes.
    plan = Plan.model_validate_json(json.dumps(document | {"schedule": [[0, "whole"]]}), strict=True)
    schedule = schedule_from_json(parts)
    plan = plan.model_copy(update={"schedule": schedule})
    if schedule.span.start != 0:
        raise ValueError("it does not start at the first step")
    if depth(schedule) > len(schedule.span):
        raise ValueError("it has more checkpoints within one another than steps")
    allow_depth(len(schedule.span))
    if plan.problem.training and any(run.away for run in all_runs(schedule)):
        raise ValueError("it has state in host memory, which training cannot")
    return plan


def _digest(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
