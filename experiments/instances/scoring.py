"""A solver on the instances, against the best that is known; the replay is the judge."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.instances.catalogue import FOLDER, Best, read
from evoplan.experiments.instances.rotor import rotor
from evoplan.planner.errors import RunError
from evoplan.planner.schedules.replay import replay
from evoplan.planner.sizes import exact_size
from evoplan.planner.solvers import SOLVERS, Find, InfeasibleError


class RefusedError(RunError):
    """A solver's schedule is none, or does not fit the budget that it was given."""


@dataclass(frozen=True)
class Score:
    """What a solver found for one budget; None: nothing that fits.

    Attributes:
        over_best, over_bound: its step time over the best known, and over what is proven.
        solver_seconds: what it took to find it.
    """

    instance: str
    budget_bytes: int
    step_seconds: float | None
    over_best: float | None
    over_bound: float | None
    solver_seconds: float


def found_solver(name: str) -> Find:
    """A solver by its name, or a function in a file: `file.py:function`.

    Raises:
        ValueError: there is none; says which there are, or what is wrong with the file.
    """
    if ":" in name:
        return _from_file(*name.rsplit(":", 1))
    solvers: dict[str, Find] = {"rotor": rotor, **SOLVERS}
    if name not in solvers:
        raise ValueError(
            f"unknown solver {name!r}; choose of: {', '.join(solvers)}, or name file.py:function"
        )
    return solvers[name]


def _from_file(path: str, function: str) -> Find:
    spec = importlib.util.spec_from_file_location("solver_of_user", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: is no Python file; name file.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is in it
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{path}: has no function {function}")
    return found  # type: ignore[no-any-return]


def score(solver: Find, instance: str, folder: Path = FOLDER) -> Iterator[Score]:
    """What a solver finds for each of an instance's budgets.

    Raises:
        RefusedError: the replay says that a schedule takes more than the budget, or is none.
        ValueError: there is no such instance.
    """
    table, best = read(instance, folder)
    for known in best:
        yield _scored(solver, instance, table, known)


def _scored(solver: Find, instance: str, table: CostTable, known: Best) -> Score:
    start = time.perf_counter()
    try:
        schedule = solver(table, known.budget_bytes)
    except InfeasibleError:
        return Score(instance, known.budget_bytes, None, None, None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    try:
        played = replay(schedule, table)
    except (ValueError, AttributeError, TypeError) as error:
        raise RefusedError(
            f"{instance}: what the solver returns is no schedule of the table: {error}"
        ) from None
    if played.peak_bytes > known.budget_bytes:
        raise RefusedError(
            f"{instance}: the schedule takes {exact_size(played.peak_bytes)} by the replay, "
            f"the budget is {exact_size(known.budget_bytes)}"
        )
    took = played.seconds
    return Score(
        instance, known.budget_bytes, took, took / known.seconds, took / known.bound_seconds, seconds
    )
