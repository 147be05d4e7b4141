"""What was found, as a document that grows row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from evoplan.planner.files import write_json

Status = Literal["ok", "wrong", "failed"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Times(_Model):
    """Seconds of a step over the rounds."""

    median: float
    quartiles: tuple[float, float]
    least: float
    most: float
    rounds: list[float]

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """From those of each round."""
        low, middle, high = (float(np.percentile(seconds, q)) for q in (25, 50, 75))
        return cls(
            median=middle, quartiles=(low, high), least=min(seconds), most=max(seconds), rounds=seconds
        )


class Ours(_Model):
    """The plan for a peer's measured peak; `reason` where there is none.

    Attributes:
        peak_bytes, predicted_peak_bytes, budget_bytes: above static.
        ratio: of the medians, the plan's over the peer's; `ratio_quartiles`: of the ratios by round.
    """

    budget_bytes: int
    reason: str | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    seconds: Times | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None


class Row(_Model):
    """One peer at one budget.

    Attributes:
        unit, asked: of its budget, and what it was asked for: a fraction, or bytes above static.
        asked_bytes: the same in bytes: of a fraction, that of the plain model's peak.
        reason: in a line, why it failed or what is wrong.
        peak_bytes: measured, above static.
        setup_seconds: until its first step was done.
    """

    name: str
    about: str
    source: str
    kind: Literal["hand", "automatic", "ours"]
    unit: Literal["bytes", "fraction"] | None = None
    share: float | None = None
    asked: float | None = None
    asked_bytes: int | None = None
    status: Status = "ok"
    reason: str | None = None
    peak_bytes: int | None = None
    seconds: Times | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    setup_seconds: float | None = None
    ours: Ours | None = None

    @property
    def label(self) -> str:
        """Name and asking."""
        return self.name if self.share is None else f"{self.name} {self.share:g}"


class Document(_Model):
    """A comparison.

    Attributes:
        static_bytes: parameters, gradients and inputs: live before every step.
    """

    torch: str
    device: str
    blocks: int
    s: int
    r: int
    widths: str
    precision: str
    rounds: int
    static_bytes: int = 0
    plain_peak_bytes: int = 0
    rows: list[Row] = []

    @property
    def about(self) -> dict[str, Any]:
        """What has to be the same for rows to be kept."""
        return self.model_dump(exclude={"static_bytes", "plain_peak_bytes", "rows"})

    def row(self, name: str, share: float | None) -> Row | None:
        """That of a peer at an asking, if it is there."""
        return next((row for row in self.rows if (row.name, row.share) == (name, share)), None)

    def put(self, row: Row) -> None:
        """In the place of an older one, or at the end."""
        old = self.row(row.name, row.share)
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row

    def write(self, path: Path) -> None:
        """All of it or nothing."""
        write_json(path, self.model_dump(mode="json"))


def read(path: Path) -> Document:
    """A document that was written.

    Raises:
        ValueError: it is none; OSError: it cannot be read.
    """
    try:
        return Document.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: is no comparison ({where}: {first['msg']})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is no comparison ({error})") from None


def resumed(path: Path, fresh: Document) -> Document:
    """The document of an earlier run of the same comparison, to go on with; the fresh one if there is none.

    Raises:
        ValueError: the file has another comparison; says what differs.
    """
    if not path.exists():
        return fresh
    earlier = read(path)
    differs = [name for name, value in fresh.about.items() if earlier.about[name] != value]
    if differs:
        was = ", ".join(f"{name} {earlier.about[name]}" for name in differs)
        raise ValueError(f"{path}: has another comparison ({was}); leave --resume out or name another --json")
    return earlier
