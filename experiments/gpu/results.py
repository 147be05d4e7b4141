"""What is known of each part: a file of its own, written after every run, from which a later call goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from evoplan.experiments.gpu.setting import Row
from evoplan.planner.files import write_json


@dataclass
class Results:
    """The file of one part.

    Attributes:
        settings: what its figures depend on.
        rows: by run; one with `error` is run again.
        complete: whether all its runs have been tried.
        skipped: why the part is not run here.
    """

    path: Path
    settings: Row
    rows: dict[str, Row]
    complete: bool = False
    skipped: str | None = None

    @classmethod
    def of(cls, folder: Path, part: str, settings: Row) -> Results:
        """What the file has, if it was made under the same settings; else nothing yet."""
        path = folder / f"{part}.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["settings"] == settings:
                return cls(path, settings, *(document[key] for key in ("rows", "complete", "skipped")))
        except (OSError, ValueError, LookupError, TypeError):  # none yet, or something else
            pass
        return cls(path, settings, {})

    def has(self, run: str) -> bool:
        """Whether a run is through."""
        return run in self.rows and "error" not in self.rows[run]

    @property
    def failed(self) -> list[str]:
        """Runs that ended in an error."""
        return [run for run, row in self.rows.items() if "error" in row]

    def write(self) -> None:
        """All of it, or nothing."""
        write_json(self.path, {name: value for name, value in vars(self).items() if name != "path"})
