"""Which times a plan is made with."""

from __future__ import annotations

from typing import Any, Literal

from evoplan.cost_model.machine import default_cache
from evoplan.cost_model.times import Measured, Roofline, TimeSource
from evoplan.cost_model.times_cache import MissingTimesError, TimesCache
from evoplan.planner.problems.costing import Costed, cost_problem, device_of
from evoplan.planner.problems.problem import Problem

Times = Literal["auto", "measured", "calibrated", "roofline"]
ADVICE = "run `evoplan profile` for this model, shapes and dtype, or use --times roofline"


def times_cache(problem: Problem, path: str | None = None) -> TimesCache | None:
    """The cache of times of a problem's device; None where that is not this machine's."""
    if problem.own_device is not None or problem.device not in ("cpu", "cuda"):
        return None
    return TimesCache(path or default_cache(), problem.device)


def time_source(problem: Problem, times: Times, path: str | None = None) -> TimeSource | None:
    """Times of that kind; None: there are none.

    Args:
        path: of the cache; the user's own if not given.
    """
    where, link = device_of(problem), problem.link_on(device_of(problem))
    if times == "roofline":
        return Roofline(where, problem.precision, link)
    cache = times_cache(problem, path)
    calibration = cache.calibration(problem.precision) if cache else None
    if cache is None or calibration is None:  # a profile ends with a calibration
        return None
    device = calibration.applied(where, problem.precision)
    calibrated = Roofline(device, problem.precision, link, "calibrated")
    if times == "calibrated":
        return calibrated
    return Measured(cache, calibrated) if problem.ranks == 1 else None


def cost_with_times(problem: Problem, times: Times = "auto", path: str | None = None, **rest: Any) -> Costed:
    """`cost_problem` with times of a kind.

    Args:
        times: auto is the best there is: measured, else calibrated, else the roofline.
        path: of the cache of times; the user's own if not given.

    Raises:
        MissingTimesError: there are none of that kind; says what to do.
    """
    kinds: tuple[Times, ...] = ("measured", "calibrated", "roofline") if times == "auto" else (times,)
    for kind in kinds:
        source = time_source(problem, kind, path)
        if source is None:
            missing = f"no {kind} times for {problem.device} in {problem.precision}"
            missing += f" on {problem.ranks} ranks" if problem.ranks > 1 else ""
            continue
        try:
            return cost_problem(problem, times=source, **rest)
        except MissingTimesError as error:
            missing = str(error)
    here = times_cache(problem, path) is not None and problem.ranks == 1
    raise MissingTimesError(f"{missing}; {ADVICE if here else 'use --times calibrated or roofline'}")
