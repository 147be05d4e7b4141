"""Measuring what a problem's steps take on this machine, for the planner to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cost_model.calibrate import Calibration, fit
from cost_model.devices import Device
from cost_model.profile import time_step, with_data
from cost_model.steps import StepCost
from cost_model.times import Key, Timing, key_of
from cost_model.trace import Work
from model.chain import Chain, Step
from planner.costing import Costed, cost_problem
from planner.problem import Problem
from planner.timing import times_cache
from planner.trial import available_bytes, random_inputs

SHARE = 0.9  # of the free memory that a run may take


@dataclass(frozen=True, eq=False)
class Measurement:
    """One strategy of one step: its cost by the roofline, and what was measured; None: it does not fit."""

    step: Step
    cost: StepCost
    timing: Timing | None

    def pairs(self) -> list[tuple[Work, float]]:
        """Work and seconds of each phase that was measured."""
        works = self.cost.discard_work, self.cost.forward_work, self.cost.backward_work
        times = self.timing[:3] if self.timing else ()
        return [(work, seconds) for work, seconds in zip(works, times, strict=False) if seconds > 0]


def profile_problem(
    problem: Problem,
    cache_path: str | None,
    repeats: int,
    max_pieces: int | None = None,
    again: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Measurement], Calibration, Device]:
    """Time every distinct step of a problem under every strategy that fits here; the cache keeps the times.

    Each time is kept as soon as it is measured, so a profile that was broken off goes on where it was.

    Args:
        cache_path: of the cache; the user's own if not given.
        repeats: timed runs of each, whose medians count.
        max_pieces: leave out strategies of more pieces.
        again: measure what the cache has as well.

    Returns:
        What was measured; the calibration from all times of this dtype; the device with its constants.

    Raises:
        ValueError: the problem is not for this machine, or for several ranks.
    """
    cache = times_cache(problem, cache_path)
    if cache is None:
        raise ValueError(f"times are measured here: use --device cpu or cuda, not {problem.device}")
    if problem.ranks > 1:
        raise ValueError(
            "times are measured on one rank; leave --ranks out, and plan with --times calibrated"
        )
    costed = cost_problem(problem, progress=lambda name: progress(f"tracing {name}"))
    kind = problem.device
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), kind)
    with torch.no_grad():
        state, constants = costed.model.prepare(**inputs)
    room = SHARE * available_bytes(kind)
    found: list[Measurement] = []
    seen: set[int] = set()
    for step, options in zip(Chain.of(costed.model).steps, costed.table.options, strict=True):
        if id(options) in seen:
            continue
        seen.add(id(options))
        wanted = [cost for cost in options if max_pieces is None or cost.strategy.n <= max_pieces]
        known = {cost.strategy: None if again else cache.get(_key(costed, step, cost)) for cost in wanted}
        missing = [cost for cost in wanted if known[cost.strategy] is None and _peak(cost) <= room]
        if missing:
            torch_dtype = getattr(torch, problem.dtype)
            here = with_data(step, torch_dtype, kind)
            here.submodule.train(problem.training)
            strategies = [cost.strategy for cost in missing]
            timings = time_step(here, strategies, state, constants, repeats, progress)
            for cost in missing:
                known[cost.strategy] = timings[cost.strategy]
                cache.put(_key(costed, step, cost), timings[cost.strategy], cost)
        found += [Measurement(step, cost, known[cost.strategy]) for cost in wanted]
    calibration = fit(cache.measured(problem.dtype), costed.device, problem.dtype)
    cache.put_calibration(problem.dtype, calibration.to_json())
    return found, calibration, calibration.applied(costed.device, problem.dtype)


def _key(costed: Costed, step: Step, cost: StepCost) -> Key:
    problem = costed.problem
    return key_of(step, problem.state_shapes(), problem.dtype, cost.strategy, problem.training)


def _peak(cost: StepCost) -> int:
    return max(cost.forward_bytes, cost.backward_bytes, cost.discard_bytes)
