"""Traced costs kept on disk: what one process has traced, the next one reads.

A trace follows from the sources of the model and of the cost model, torch, the step with its widths, the
tensors that it reads, and how it is run. All of that is the key, so nothing in the file is ever out of date.
The file is SQLite; where it cannot be used, everything is traced, as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from time import time
from typing import Any

import torch

from evoplan.cost_model.machine import caches_folder, local_name
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule

FORGET_AFTER = 30 * 24 * 3600  # seconds without use, for traces of other sources
MOST_BYTES = 2**29  # beyond it nothing is added
_TABLE = (
    "create table if not exists costs (step text, strategy text, cost text, primary key (step, strategy))"
)
_BYTES = ("forward_bytes", "preserved_bytes", "backward_bytes", "discard_bytes")
_WORKS = ("discard_work", "forward_work", "backward_work")


class KeptTraces:
    """Costs of steps by what they depend on.

    Args:
        path: of the file; the user's own if not given. EVOPLAN_TRACES names another; empty: none is kept.
        about: what all costs depend on that are asked for here.
    """

    def __init__(self, about: Sequence[Any], path: Path | None = None) -> None:
        self.path = default_path() if path is None else path
        self._about = (*_surroundings(), *about)

    def costs(
        self,
        submodule: Submodule,
        about: Sequence[Any],
        strategies: Sequence[Strategy],
        trace: Callable[[Sequence[Strategy]], list[StepCost]],
    ) -> list[StepCost]:
        """Costs of a step under some strategies: those that are kept, and those that `trace` finds.

        Args:
            about: what they depend on, besides the submodule.
        """
        if self.path is None or not _is_ours(submodule):
            return trace(strategies)
        key = hashlib.sha256(
            repr((self._about, submodule.signature(), submodule.shared_by, *about)).encode()
        ).hexdigest()
        known = self._read(key)
        missing = [strategy for strategy in strategies if str(strategy) not in known]
        if missing:
            found = dict(zip(map(str, missing), trace(missing), strict=True))
            self._write(key, found)
            known |= found
        return [known[str(strategy)] for strategy in strategies]

    def _read(self, key: str) -> dict[str, StepCost]:
        assert self.path is not None
        if not self.path.is_file():
            return {}
        try:
            with closing(sqlite3.connect(self.path, timeout=5)) as connection:
                rows = connection.execute(
                    "select strategy, cost from costs where step = ?", (key,)
                ).fetchall()
            return {strategy: _from_json(strategy, text) for strategy, text in rows}
        except (sqlite3.Error, ValueError, TypeError, KeyError):
            return {}

    def _write(self, key: str, found: dict[str, StepCost]) -> None:
        assert self.path is not None
        rows = [(key, strategy, _to_json(cost)) for strategy, cost in found.items()]
        with suppress(OSError, sqlite3.Error):
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _forget_others(self.path)
            elif self.path.stat().st_size > MOST_BYTES:
                return
            with closing(sqlite3.connect(self.path, timeout=5)) as connection, connection:
                connection.execute(_TABLE)
                connection.executemany("insert or replace into costs values (?, ?, ?)", rows)


def default_path() -> Path | None:
    """The file of traces made by these sources; None where EVOPLAN_TRACES is set to nothing."""
    folder = os.environ.get("EVOPLAN_TRACES")
    if folder == "":
        return None
    return (Path(folder) if folder else caches_folder()) / f"traces-{_digest_of_sources()}.sqlite"


def _forget_others(path: Path) -> None:
    for other in path.parent.glob("traces-*.sqlite"):
        if time() - other.stat().st_mtime > FORGET_AFTER:
            other.unlink()


def _is_ours(submodule: Submodule) -> bool:
    # Of a layer or a submodule that somebody else wrote, the sources are not in the digest.
    return type(submodule).__module__.startswith("evoplan.") and not any(altered_layers(submodule))


def _surroundings() -> tuple[Any, ...]:
    return (
        torch.__version__,
        local_name("cpu"),  # its processor and threads, on which scratch depends
        torch.are_deterministic_algorithms_enabled(),
    )


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


def _to_json(cost: StepCost) -> str:
    works = [
        [[[*key, n] for key, n in counted.items()] for counted in (work.kernels, work.collectives)]
        for work in (getattr(cost, name) for name in _WORKS)
    ]
    return json.dumps([[getattr(cost, name) for name in _BYTES], works])


def _from_json(strategy: str, text: str) -> StepCost:
    sizes, works = json.loads(text)
    discard, forward, backward = (
        Work(*(Counter({(a, b): n for a, b, n in counted}) for counted in work)) for work in works
    )
    return StepCost(
        Strategy.parse(strategy),
        **dict(zip(_BYTES, sizes, strict=True)),
        discard_work=discard,
        forward_work=forward,
        backward_work=backward,
    )
