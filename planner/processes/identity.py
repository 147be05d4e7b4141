"""What ranks compare to see that they run the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def odd_ones(values: Mapping[int, Any]) -> list[int]:
    """The ranks whose value is not the usual one; between equally many, rank 0's is."""
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    return [rank for rank, value in values.items() if value != usual]


@cache
def _code() -> str:
    """The version of evoplan and a digest of its source."""
    try:
        number = version("evoplan")
    except PackageNotFoundError:
        number = "?"
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in ("model", "cost_model", "planner"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{number} ({digest.hexdigest()[:12]})"
