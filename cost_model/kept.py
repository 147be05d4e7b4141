"""What is kept on disk between processes, under keys of all that it follows from.

So nothing in the file is ever out of date. It is SQLite; where it cannot be used, everything is found anew,
as if it were not there.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from time import time
from typing import Any

import torch

from evoplan.cost_model.machine import caches_folder, kernels_of_cpu, local_name

FORGET_AFTER = 30 * 24 * 3600  # seconds without use, for what other sources have found
MOST_BYTES = 2**29  # beyond it nothing is added
_TABLE = (
    "create table if not exists costs (step text, strategy text, cost text, primary key (step, strategy))"
)


class Store:
    """Texts by a key and a name.

    Args:
        path: of the file; the user's own if not given. EVOPLAN_TRACES names another; empty: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = default_path() if path is None else path

    def read(self, key: str) -> dict[str, str]:
        """All texts of a key, by name."""
        if self.path is None or not self.path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(self.path, timeout=5)) as connection:
                found = connection.execute("select strategy, cost from costs where step = ?", (key,))
                return dict(found.fetchall())
        except sqlite3.Error:
            return {}

    def write(self, key: str, texts: Mapping[str, str]) -> None:
        """Add texts to those of a key."""
        if self.path is None:
            return
        with suppress(OSError, sqlite3.Error):
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _forget_others(self.path)
            elif self.path.stat().st_size > MOST_BYTES:
                return
            with closing(sqlite3.connect(self.path, timeout=5)) as connection, connection:
                connection.execute(_TABLE)
                connection.executemany(
                    "insert or replace into costs values (?, ?, ?)",
                    [(key, name, text) for name, text in texts.items()],
                )


def key_of(about: Sequence[Any]) -> str:
    """Equal for what is told by equal texts."""
    return hashlib.sha256(repr(tuple(about)).encode()).hexdigest()


def surroundings() -> tuple[Any, ...]:
    """What all traces follow from."""
    return (
        torch.__version__,
        local_name("cpu"),  # its processor and threads, on which scratch depends
        kernels_of_cpu(),
        torch.are_deterministic_algorithms_enabled(),
    )


def default_path() -> Path | None:
    """The file of what these sources have found; None where EVOPLAN_TRACES is set to nothing."""
    folder = os.environ.get("EVOPLAN_TRACES")
    if folder == "":
        return None
    return (Path(folder) if folder else caches_folder()) / f"traces-{_digest_of_sources()}.sqlite"


@cache
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    here = Path(__file__).parent
    for folder in (here, here.parent / "model"):
        yield from sorted(folder.rglob("*.py"))


def _forget_others(path: Path) -> None:
    for other in path.parent.glob("traces-*.sqlite"):
        if time() - other.stat().st_mtime > FORGET_AFTER:
            other.unlink()
