"""Measuring what a problem's steps take on this machine, for the planner to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from evoplan.cost_model.calibrate import Calibration, fit
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.devices import Device
from evoplan.cost_model.profile import bytes_taken, largest_error, time_step, with_data
from evoplan.cost_model.steps import StepCost, opaque_strategies
from evoplan.cost_model.times import timed_as
from evoplan.cost_model.times_cache import Key, MeasuredBytes, TimesCache, Timing, key_of
from evoplan.cost_model.trace import Work
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.context import autocast
from evoplan.model.running.kernels import KERNELS
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import COMPILED, Strategy
from evoplan.planner.checking.trial import available_bytes, random_inputs
from evoplan.planner.problems.costing import Costed, cost_problem, kind_of
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times, times_cache
from evoplan.planner.solvers.confirming import MORE, confirmed

Progress = Callable[[str], None]

SHARE = 0.9  # of the free memory that a run may take
# Largest error of a kernel that is not ours against the formula, by dtype: its own rounding.
EXACT = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
EXACT |= {"bf16-mixed": 5e-2, "fp16-mixed": 5e-2}


@dataclass(frozen=True, eq=False)
class Measurement:
    """One strategy of one step.

    Attributes:
        cost: by the roofline; None where it cannot be traced.
        timing: what was measured; None where it was not.
        reason: why not.
        taken: bytes that were measured, of a strategy that cannot be traced.
    """

    step: Step
    strategy: Strategy
    cost: StepCost | None
    timing: Timing | None
    reason: str | None = None
    taken: MeasuredBytes | None = None

    @property
    def preserved_bytes(self) -> int | None:
        """What a forward keeps for its backward."""
        if self.cost is not None:
            return self.cost.preserved_bytes
        return self.taken and self.taken.preserved

    def pairs(self) -> list[tuple[Work, float]]:
        """Work and seconds of each phase that was measured."""
        cost, times = self.cost, self.timing[:3] if self.timing else ()
        works = () if cost is None else (cost.discard_work, cost.forward_work, cost.backward_work)
        return [(work, seconds) for work, seconds in zip(works, times, strict=False) if seconds > 0]


def profile_problem(
    problem: Problem,
    cache_path: str | None,
    repeats: int,
    max_pieces: int | None = None,
    again: bool = False,
    compiled: bool = False,
    progress: Progress = lambda _: None,
    done: Progress = lambda _: None,
) -> tuple[list[Measurement], Calibration, Device]:
    """Time every distinct step of a problem under every strategy that fits here; the cache keeps the times.

    Each time is kept as soon as it is measured, so a profile that was broken off goes on where it was. In
    training, what plans then choose is timed once more (`planner.solvers.confirming`).

    Args:
        cache_path: of the cache; the user's own if not given.
        repeats: timed runs of each, whose medians count.
        max_pieces: leave out strategies of more pieces.
        again: measure what the cache has as well.
        compiled: also try torch.compile on each step, which takes a while.
        done: told of each step that is through.

    Returns:
        What was measured; the calibration from all times of this dtype; the device as it is listed.

    Raises:
        ValueError: the problem is not for this machine, or for several ranks.
    """
    cache = times_cache(problem, cache_path)
    if cache is None:
        raise ValueError(f"times are measured here: use --device cpu or cuda, not {problem.device}")
    if problem.ranks > 1:
        raise ValueError("times are measured on one rank; leave --ranks out, plan with --times calibrated")
    costed = cost_problem(problem, progress=lambda name: progress(f"tracing {name}"))
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), problem.device)
    with torch.no_grad():
        state, constants = costed.model.prepare(**inputs)
    costed.model.train(problem.training)
    profiler = _Profiler(problem, cache, state, constants, repeats, again, progress)
    found: list[Measurement] = []
    seen: set[Key] = set()

    def calibrate() -> Calibration:
        calibration = fit(cache.measured(problem.precision), costed.device, problem.precision)
        cache.put_calibration(problem.precision, calibration)
        return calibration

    for step, options in zip(Chain.of(costed.model).steps, costed.table.options, strict=True):
        key = key_of(step, problem.state_shapes(), problem.precision, WHOLE)
        if key in seen:
            continue
        seen.add(key)
        few = [cost for cost in options if max_pieces is None or cost.strategy.n <= max_pieces]
        before = len(found)
        opaque = [
            strategy
            for strategy in opaque_strategies(step, state[step.target].shape, costed.device.kind)
            if strategy.n <= (max_pieces or strategy.n) and (compiled or strategy.kernel != COMPILED)
        ]
        found += profiler.measure(step, few, opaque)
        timed = sum(row.timing is not None for row in found[before:])
        done(f"{kind_of(step.name)}: times of {timed} strategies")
    calibrate()
    if problem.training:
        profiler.confirm(cost_with_times(problem, "measured", cache_path))
    found = [replace(row, timing=cache.get(profiler.key(row.step, row.strategy))) for row in found]
    return found, calibrate(), costed.device


@dataclass
class _Profiler:
    """Measures steps of one problem on one state."""

    problem: Problem
    cache: TimesCache
    state: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    repeats: int
    again: bool
    progress: Progress

    def measure(self, step: Step, costs: Sequence[StepCost], opaque: Sequence[Strategy]) -> list[Measurement]:
        """A step under every strategy that fits here, all timed in turn, as a machine's speed drifts.

        Args:
            costs: of strategies whose memory is known.
            opaque: those that cannot be traced.
        """
        rows = [self._row(step, cost) for cost in costs] + [self._opaque(step, way) for way in opaque]
        todo = [row.strategy for row in rows if row.timing is None and row.reason is None]
        times = self._timed(step, todo) if todo else {}
        for row in rows:
            if row.strategy in times:
                self.cache.put(self.key(step, row.strategy), times[row.strategy], row.cost, row.taken)
        return [replace(row, timing=times.get(row.strategy, row.timing)) for row in rows]

    def _row(self, step: Step, cost: StepCost) -> Measurement:
        """What is known of a strategy, or why it cannot be timed."""
        timing = self._known(step, cost.strategy)
        fits = timing is not None or _peak(cost) <= SHARE * available_bytes(self.problem.device)
        reason = None if fits else "it needs more memory than is free"
        return Measurement(step, cost.strategy, cost, timing, reason)

    def _opaque(self, step: Step, strategy: Strategy) -> Measurement:
        """One that cannot be traced is on offer only if it does what whole does, and with its memory."""
        timing = self._known(step, strategy)
        if timing is not None:
            taken = self.cache.get_bytes(self.key(step, strategy))
            return Measurement(step, strategy, None, timing, taken=taken)
        missing = KERNELS[strategy.kernel].missing if strategy.kernel in KERNELS else None
        if missing:
            return Measurement(step, strategy, None, None, missing)
        self.progress(f"{step.name} {strategy}")
        here, given, casting = self._here(step), (self.state, self.constants), self._casting
        try:
            error = largest_error(here, strategy, *given, casting)
            if not error <= EXACT[self.problem.precision]:
                return Measurement(step, strategy, None, None, f"it is off by {error:.1g}")
            taken = bytes_taken(here, strategy, *given, casting)
        except Exception as reason:  # whatever a library says when it cannot
            said = str(reason).strip().splitlines() or [type(reason).__name__]
            return Measurement(step, strategy, None, None, said[0])
        return Measurement(step, strategy, None, None, taken=taken)

    def _timed(self, step: Step, strategies: list[Strategy]) -> dict[Strategy, Timing]:
        """New times, as if measured with those that are known: a whole run tells how the machine is now."""
        known = self._known(step, WHOLE)
        beside = [WHOLE] if known is not None and WHOLE not in strategies else []
        given = self.state, self.constants, self.repeats, self.progress, self._casting
        times = time_step(self._here(step), [*beside, *strategies], *given)
        speed = known.seconds / times[WHOLE].seconds if beside and known is not None else 1.0
        return {strategy: times[strategy].scaled(speed) for strategy in strategies}

    @property
    def _casting(self) -> Casting:
        return partial(autocast, self.problem.device, self.problem.autocast, keep_casts=False)

    def _known(self, step: Step, strategy: Strategy) -> Timing | None:
        return None if self.again else self.cache.get(self.key(step, strategy))

    def _here(self, step: Step) -> Step:
        return with_data(step, getattr(torch, self.problem.dtype), self.problem.device)

    def confirm(self, costed: Costed) -> None:
        """Time once more what plans choose, and keep that in place of the first times."""
        steps = Chain.of(costed.model.train()).steps
        given = self.state, self.constants, MORE * self.repeats, self.progress, self._casting

        def again(step: int, costs: Sequence[StepCost]) -> list[StepCost]:
            times = time_step(self._here(steps[step]), [cost.strategy for cost in costs], *given)
            return [timed_as(cost, times[cost.strategy]) for cost in costs]

        def known(step: int, strategy: Strategy) -> bool:
            return self.cache.confirmed(self.key(steps[step], strategy))

        def able(step: int, strategy: Strategy) -> bool:
            return self.cache.get(self.key(steps[step], strategy)) is not None

        table, chosen = confirmed(costed.table, again, known, able)
        for step, strategies in chosen.items():
            for cost in table.options[step]:
                key = self.key(steps[step], cost.strategy)
                before = self.cache.get(key)
                if cost.strategy in strategies and before is not None:
                    unread = before.unread if cost.ending is None else cost.ending.seconds
                    seconds = cost.discard_seconds, cost.forward_seconds, cost.backward_seconds, unread
                    self.cache.confirm(key, Timing(*seconds, before.spread))

    def key(self, step: Step, strategy: Strategy) -> Key:
        problem = self.problem
        return key_of(step, problem.state_shapes(), problem.precision, strategy)


def _peak(cost: StepCost) -> int:
    return max(cost.forward_bytes, cost.backward_bytes, cost.discard_bytes)
