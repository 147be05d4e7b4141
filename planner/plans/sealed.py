"""Plan files: one JSON document each, sealed with a digest of its content. No pickles, no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from evoplan.planner.files import write_json
from evoplan.planner.schedules.schedule import Sequence, all_runs, allow_depth, depth
from evoplan.planner.schedules.text import schedule_from_json, schedule_to_json, short

MOST_CHARACTERS = 64 * 2**20  # of a plan file; a thousand blocks take one


class PlanFileError(ValueError):
    """A plan file that cannot be used; the message is one line that names it."""


class Sealed(BaseModel):
    """A document with a schedule that can be saved, and told from one that was altered."""

    def to_json(self) -> dict[str, Any]:
        """The document, sealed with a digest of its content."""
        # The schedule by itself: it may be nested deeper than pydantic goes.
        document = self.model_dump(mode="json", exclude={"schedule"})
        document["schedule"] = schedule_to_json(self.schedule)  # type: ignore[attr-defined]
        return {**document, "digest": _digest(document)}

    @property
    def identity(self) -> dict[str, str]:
        """What ranks compare to see that they have the same plan."""
        return {"plan": self.to_json()["digest"][:12]}

    def save(self, path: str | Path) -> None:
        """Write the plan, all of it or nothing.

        Args:
            path: of the file, JSON.
        """
        write_json(path, self.to_json())


SomePlan = TypeVar("SomePlan", bound=Sealed)


@dataclass(frozen=True)
class Reader(Generic[SomePlan]):
    """Reads and checks files of one format.

    Attributes:
        kind: of the plan in it.
        format, schema: as the file names them.
        make: what to do to get one, for errors.
        check: what else must hold; raises ValueError.
    """

    kind: type[SomePlan]
    format: str
    schema: int
    make: str
    check: Callable[[SomePlan], None]

    def load(self, path: str | Path) -> SomePlan:
        """Read and check a file.

        Raises:
            PlanFileError: missing, cut off, altered, of another schema, or not such a plan.
        """
        document = self._read(path)
        found = _format_of(document)
        if found != self.format:
            what = _OTHERS.get(str(found), f"not a plan file; make one with {self.make}")
            raise PlanFileError(f"{path}: {what}")
        schema = document.get("schema_version")
        if schema != self.schema or not isinstance(schema, int) or isinstance(schema, bool):
            raise PlanFileError(
                f"{path}: plan schema {short(schema)}, this version reads {self.schema}; "
                f"make it again with {self.make}"
            )
        try:
            digest = document.pop("digest", None)
            if digest != _digest(document):
                raise PlanFileError(f"{path}: altered since it was made; make it again with {self.make}")
            return self._checked(document)
        except PlanFileError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part)[:40] for part in first["loc"][:6]) + ": " if first["loc"] else ""
            message = first["msg"].removeprefix("Value error, ")
            raise PlanFileError(f"{path}: {where}{message}; make it again with {self.make}") from None
        except (ValueError, RecursionError) as error:
            raise PlanFileError(f"{path}: schedule: {error}; make it again with {self.make}") from None

    def wrote(self, path: str | Path) -> bool:
        """Whether a file says that it is of this format."""
        try:
            return _format_of(self._read(path)) == self.format
        except PlanFileError:
            return False

    def _read(self, path: str | Path) -> Any:
        """What the file holds."""
        if not isinstance(path, str | Path):
            raise ValueError(f"a plan's file is of class {type(path).__name__}; give its path")
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(MOST_CHARACTERS)
                if file.read(1):
                    raise PlanFileError(f"{path}: too long for a plan file; make one with {self.make}")
            return json.loads(text)
        except OSError as error:
            raise PlanFileError(
                f"{path}: cannot be read ({error.strerror}); make it with {self.make}"
            ) from None
        except json.JSONDecodeError as error:
            raise PlanFileError(
                f"{path}: cut off or not JSON (line {error.lineno}); make it again with {self.make}"
            ) from None
        except PlanFileError:
            raise
        except (ValueError, RecursionError):  # no text, numbers of thousands of digits, nested too deep
            raise PlanFileError(f"{path}: not a plan file; make one with {self.make}") from None

    def _checked(self, document: dict[str, Any]) -> SomePlan:
        """The plan that a document holds; ValueError or RecursionError where it holds none."""
        parts = document.get("schedule")
        if not isinstance(parts, list):
            raise ValueError(f"{short(parts)} is no list of parts")
        # By JSON's own types: a number in quotes is none. The schedule is checked by itself: it may be nested
        # deeper than the validation's own parser goes.
        stand_in = document | {"schedule": [[0, "whole"]]}
        plan = self.kind.model_validate_json(json.dumps(stand_in), strict=True)
        schedule = schedule_from_json(parts)
        plan = plan.model_copy(update={"schedule": schedule})
        if schedule.span.start != 0:
            raise ValueError("it does not start at the first step")
        if depth(schedule) > len(schedule.span):
            raise ValueError("it has more checkpoints within one another than steps")
        allow_depth(len(schedule.span))
        self.check(plan)
        return plan


# What a file is that another reader wants, and where it goes.
_OTHERS = {
    "evoplan-plan": "a plan of one of evoplan's own models; `evoplan verify` and `evoplan run` take it, and "
    "evoplan.apply_plan(stack, evoplan.load_plan(path))",
    "evoplan-fit": "a plan of a model that somebody else wrote; run that under it with "
    "evoplan.fit(model, args, plan=path), or look at it with `evoplan show`",
    "evoplan-certificate": "a certificate, no plan; `python tools/check_certificate.py` checks it",
}


def _format_of(document: Any) -> object:
    return document.get("format") if isinstance(document, dict) else None


def has_state_away(schedule: Sequence) -> bool:
    """Whether some step has state in host memory."""
    return any(run.away for run in all_runs(schedule))


def _digest(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
