"""What `evoplan verify --json` has found, as a page shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evoplan.planner.sizes import exact_size

MOST_CHARACTERS = 2**24
_NUMBERS = {"predicted_peak_bytes": int, "measured_peak_bytes": int, "static_bytes": int}
_MAYBE = (
    "unplanned_peak_bytes", "predicted_step_seconds", "measured_step_seconds", "unplanned_step_seconds",
    "max_loss_error", "max_gradient_error",
)  # fmt: skip


@dataclass(frozen=True)
class Verified:
    """Predicted beside measured, and beside the model without a plan. None: could not be had.

    Attributes:
        backend: what measured.
    """

    backend: str
    ok: bool
    predicted_peak_bytes: int
    measured_peak_bytes: int
    static_bytes: int
    unplanned_peak_bytes: int | None = None
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    unplanned_step_seconds: float | None = None
    max_loss_error: float | None = None
    max_gradient_error: float | None = None


def load_verified(path: str | Path, predicted_peak_bytes: int) -> Verified:
    """Read what a verification has written.

    Args:
        predicted_peak_bytes: of the plan that it has to be of.

    Raises:
        ValueError: it is none, or of another plan; one line that names the file.
    """
    make = "make it with `evoplan verify plan.json --json FILE`"
    try:
        with Path(path).open(encoding="utf-8") as file:
            document = json.loads(file.read(MOST_CHARACTERS))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {make}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: no JSON; {make}") from None
    found = verified_of(document)
    if found is None:
        raise ValueError(f"{path}: no verification; {make}")
    if found.predicted_peak_bytes != predicted_peak_bytes:
        raise ValueError(
            f"{path}: verifies another plan, or part of one (its predicted peak is "
            f"{exact_size(found.predicted_peak_bytes)}, this one's {exact_size(predicted_peak_bytes)}); "
            f"{make}"
        )
    return found


def verified_of(document: Any) -> Verified | None:
    """What a document has of a verification; None where it is none."""
    if not isinstance(document, dict) or not isinstance(document.get("ok"), bool):
        return None
    sizes = [document.get(name) for name in _NUMBERS]
    maybe = {name: document.get(name) for name in _MAYBE}
    numbers = [*sizes, *(value for value in maybe.values() if value is not None)]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        return None
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        return None
    backend = str(document.get("backend", "measured"))
    return Verified(backend, document["ok"], *sizes, **maybe)  # type: ignore[arg-type]
