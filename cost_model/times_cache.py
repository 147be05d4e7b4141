"""Measured times on disk: one SQLite file, so that a crash leaves what was there before.

What a time depends on is its key: the device and its threads, torch's version, the submodule with its widths,
the shapes it reads, the dtype, the mode and the strategy.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evoplan.cost_model.calibrate import Calibration
from evoplan.cost_model.machine import local_name
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.chain import Step
from evoplan.model.running.strategy import Strategy

Shapes = Mapping[str, tuple[int, ...]]


SCHEMA = 4  # of the file, and of what its times mean


_TABLES = """
create table if not exists times (
    device text, torch text, dtype text, step text, shapes text, strategy text, mode text,
    discard real not null, forward real not null, backward real not null, unread real not null,
    spread real not null, confirmed integer not null,
    work text not null, bytes text,
    primary key (device, torch, dtype, step, shapes, strategy, mode)
);
create table if not exists calibrations (
    device text, torch text, dtype text, constants text not null, primary key (device, torch, dtype)
);
"""


class MissingTimesError(ValueError):
    """Times were asked for that nobody has measured here."""


class Timing(NamedTuple):
    """Median seconds of a step's discarding run, recorded forward and backward.

    Attributes:
        unread: of a recorded forward whose results nobody reads; no more than that of any other.
        spread: interquartile range of the sum, over its median.
    """

    discard: float
    forward: float
    backward: float
    unread: float
    spread: float

    @property
    def seconds(self) -> float:
        """All of it: two forwards and a backward."""
        return self.discard + self.forward + self.backward

    def scaled(self, factor: float) -> Timing:
        """On a machine that is slower by a factor."""
        discard, forward, backward, unread = (factor * seconds for seconds in self[:4])
        return Timing(discard, forward, backward, unread, self.spread)


class MeasuredBytes(NamedTuple):
    """Bytes of a step, as in `StepCost`, but of backward what it adds to what is live before it."""

    discard: int
    forward: int
    preserved: int
    vjp: int


class Key(NamedTuple):
    """What a time depends on, besides the device and torch."""

    dtype: str
    step: str
    shapes: str
    strategy: str
    mode: str


_OF_KEY = " and ".join(f"{name} = ?" for name in ("device", "torch", *Key._fields))


class TimesCache:
    """Measured times and calibrations of one device under this torch.

    Args:
        path: made when it is written to first.
        device: cpu or cuda: this machine's.

    Raises:
        ValueError: the file is no cache.
    """

    def __init__(self, path: str | Path, device: str) -> None:
        self.path, self.here = Path(path), (local_name(device), torch.__version__)

    def _damaged(self, what: object) -> ValueError:
        return ValueError(
            f"{self.path}: is no cache of times ({what}); "
            "delete it, or name another with --cache or EVOPLAN_CACHE"
        )

    @contextmanager
    def _open(self, write: bool = False) -> Iterator[sqlite3.Connection | None]:
        """The file; None where there is nothing to be read."""
        if not write and not self.path.exists():
            yield None
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=30)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"{self.path}: cannot be opened ({error}); name another file with --cache"
            ) from None
        try:
            with connection:
                (schema,) = connection.execute("pragma user_version").fetchone()
                if schema not in (0, SCHEMA):
                    raise sqlite3.DatabaseError(f"of version {schema}, this is {SCHEMA}")
                if schema == 0 and connection.execute("select 1 from sqlite_master").fetchone():
                    raise sqlite3.DatabaseError("it is another program's")
                if write and schema == 0:
                    connection.executescript(f"{_TABLES} pragma user_version = {SCHEMA};")
                yield connection if write or schema else None
        except sqlite3.DatabaseError as error:
            lacks = any(text in str(error) for text in ("no such", "no column"))  # of tables
            if isinstance(error, sqlite3.OperationalError) and not lacks:  # locked, read-only, a full disk
                raise ValueError(
                    f"{self.path}: {error}; try again, or name another file with --cache"
                ) from None
            raise self._damaged(error) from None
        finally:
            connection.close()

    def _row(self, key: Key, *columns: str) -> tuple[Any, ...] | None:
        """Some columns of what was measured."""
        with self._open() as connection:
            if connection is None:
                return None
            query = f"select {', '.join(columns)} from times where {_OF_KEY}"
            row: tuple[Any, ...] | None = connection.execute(query, (*self.here, *key)).fetchone()
        return row

    def get(self, key: Key) -> Timing | None:
        """What was measured."""
        row = self._row(key, *Timing._fields)
        if row is None:
            return None
        if not (all(_is_amount(value) for value in row) and Timing(*row).seconds > 0):
            raise self._damaged(f"a time of {key.step} is none")
        return Timing(*row)

    def confirmed(self, key: Key) -> bool:
        """Whether what was measured was measured once more."""
        row = self._row(key, "confirmed")
        return bool(row and row[0])

    def confirm(self, key: Key, found: Timing) -> None:
        """Keep times in place of those that were measured first."""
        with self._open(write=True) as connection:
            assert connection is not None
            times = ", ".join(f"{name} = ?" for name in Timing._fields)
            connection.execute(
                f"update times set {times}, confirmed = 1 where {_OF_KEY}", (*found, *self.here, *key)
            )

    def get_bytes(self, key: Key) -> MeasuredBytes | None:
        """What was measured of an opaque strategy."""
        row = self._row(key, "bytes")
        if not (row and row[0]):
            return None
        try:
            taken = MeasuredBytes(*json.loads(row[0]))
            if all(type(size) is int and size >= 0 for size in taken):
                return taken
        except (ValueError, TypeError):
            pass
        raise self._damaged(f"bytes of {key.step} are none")

    def put(
        self, key: Key, found: Timing, cost: StepCost | None = None, taken: MeasuredBytes | None = None
    ) -> None:
        """Keep a measurement, in place of an older one.

        Args:
            cost: with the work that was done; None where that is not known.
            taken: bytes of a strategy that cannot be traced.
        """
        works = [] if cost is None else [cost.discard_work, cost.forward_work, cost.backward_work]
        work = json.dumps([[[*kernel, n] for kernel, n in each.kernels.items()] for each in works])
        with self._open(write=True) as connection:
            assert connection is not None
            row = (*self.here, *key, *found, 0, work, taken and json.dumps(taken))
            connection.execute(f"insert or replace into times values ({', '.join('?' * len(row))})", row)

    def measured(self, dtype: str) -> list[tuple[Work, float]]:
        """Everything that was measured in a dtype: work and seconds of each run."""
        with self._open() as connection:
            if connection is None:
                return []
            rows = connection.execute(
                "select discard, forward, backward, work from times "
                "where device = ? and torch = ? and dtype = ?",
                (*self.here, dtype),
            ).fetchall()
        try:
            return [
                (Work(Counter({(flops, moved): n for flops, moved, n in _counts(kernels)})), seconds)
                for *times, works in rows
                for seconds, kernels in zip(times, json.loads(works), strict=False)
                if seconds > 0 and kernels
            ]
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None

    def calibration(self, dtype: str) -> Calibration | None:
        """Fitted constants of a device; None where there are none."""
        with self._open() as connection:
            if connection is None:
                return None
            row = connection.execute(
                "select constants from calibrations where device = ? and torch = ? and dtype = ?",
                (*self.here, dtype),
            ).fetchone()
        try:
            return None if row is None else Calibration.from_json(json.loads(row[0]))
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None

    def put_calibration(self, dtype: str, found: Calibration) -> None:
        """Keep fitted constants, in place of older ones."""
        with self._open(write=True) as connection:
            assert connection is not None
            row = (*self.here, dtype, json.dumps(found.to_json()))
            connection.execute("insert or replace into calibrations values (?, ?, ?, ?)", row)


def _is_amount(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _counts(kernels: list[list[int]]) -> list[list[int]]:
    """Work as it is kept; ValueError where something in it is no count."""
    if not all(type(count) is int and count >= 0 for kernel in kernels for count in kernel):
        raise ValueError("work that is none")
    return kernels


def key_of(step: Step, shapes: Shapes, dtype: str, strategy: Strategy) -> Key:
    """What a step's time depends on, besides the device and torch."""
    kind, *described, parameters, altered = step.submodule.signature()
    described.append([(name, shape) for name, shape, *_ in parameters])  # the dtype is a field of its own
    described += altered
    digest = hashlib.sha256(repr(described).encode()).hexdigest()[:12]
    read = ", ".join(f"{name} {'x'.join(map(str, shapes[name]))}" for name in step.reads)
    mode = "training" if step.submodule.training else "inference"
    return Key(dtype, f"{kind} {digest}", read, str(strategy), mode)
