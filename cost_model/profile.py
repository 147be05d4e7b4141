"""Measuring the times of steps on this machine, one strategy after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from evoplan.cost_model import measure
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.times_cache import MeasuredBytes, Timing
from evoplan.model.running.chain import Step
from evoplan.model.running.execution import record, record_unread, run_discarded
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule

Progress = Callable[[str], None]


def with_data(step: Step, dtype: torch.dtype, kind: str) -> Step:
    """The step with parameters that have values, whatever device its own are on."""
    submodule: Submodule = copy.deepcopy(step.submodule).to_empty(device=kind).to(dtype)
    with torch.no_grad():
        for parameter in submodule.parameters():
            parameter.normal_(std=max(parameter.shape) ** -0.5)
    return replace(step, submodule=submodule)


def time_step(
    step: Step,
    strategies: Iterable[Strategy],
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    repeats: int,
    progress: Progress = lambda _: None,
    casting: Casting = nullcontext,
) -> dict[Strategy, Timing]:
    """Median times of a step under each strategy.

    Each round times them all, because a machine's speed drifts. Every time is that of the second of two
    runs in a row: what a step finds in caches and in the allocator's hands is its own, as in a stack.

    Args:
        step: with data, on the device of the state; in training mode if backward is wanted.
        state, constants: real tensors that the step reads.
        repeats: timed runs of each.
    """
    found: dict[Strategy, list[tuple[float, ...]]] = {strategy: [] for strategy in strategies}
    for number in range(repeats):
        for strategy, times in found.items():
            progress(f"{step.name} {strategy}, round {number + 1} of {repeats}")
            _once(step, strategy, state, constants, casting)
            times.append(_once(step, strategy, state, constants, casting))
    return {strategy: _timing(times) for strategy, times in found.items()}


def _phases(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    meter: Callable[[Callable[[], object], str], Any],
    casting: Casting,
) -> tuple[list[Any], int]:
    """What a meter reads of a discarding run and, in training, of a recorded forward, its backward, and a
    forward whose results nobody reads.

    Returns:
        The readings, and the bytes of the new target.
    """
    kind = next(iter(state.values())).device.type
    seed = 0 if step.submodule.training else None  # a dropout mask is drawn in every run
    kept: list[Any] = []

    def discard() -> None:
        with torch.no_grad(), casting():
            kept.append(run_discarded(step.submodule, strategy, step.tensors(state, constants, seed)))

    def forward() -> None:
        with casting():
            kept.extend(record(step.submodule, strategy, step.tensors(state, constants, seed)))

    def unread() -> None:
        with casting():
            kept.append(record_unread(step.submodule, strategy, step.tensors(state, constants, seed)))

    readings = [meter(discard, kind)]
    target_bytes = kept.pop().untyped_storage().nbytes()
    if seed is not None:
        readings.append(meter(forward, kind))
        run, output = kept
        grad = torch.randn_like(output)
        kept.clear()
        del output
        readings.append(meter(lambda: run.vjp(grad), kind))
        del run
        readings.append(meter(unread, kind))
    return readings, target_bytes


def _once(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    casting: Casting,
) -> tuple[float, ...]:
    """Seconds of each phase; none for those that inference has not."""
    seconds, _ = _phases(step, strategy, state, constants, measure.seconds, casting)
    return (*seconds, 0.0, 0.0, 0.0)[:4]


def _timing(times: list[tuple[float, ...]]) -> Timing:
    discard, forward, backward, unread = (median(phase) for phase in zip(*times, strict=True))
    totals = [sum(phases[:3]) for phases in times]
    low, _, high = quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
    # It does no more than the other, whatever was measured.
    return Timing(discard, forward, backward, min(unread, forward), (high - low) / median(totals))


def largest_error(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    casting: Casting = nullcontext,
) -> float:
    """How far a strategy's results and gradients are from those of a whole run, over the largest of each."""
    seed = 0 if step.submodule.training else None

    def results(strategy: Strategy) -> list[Tensor]:
        tensors = step.tensors(state, constants, seed)
        if seed is None:
            with torch.no_grad(), casting():
                return [run_discarded(step.submodule, strategy, tensors)]
        with casting():
            run, output = record(step.submodule, strategy, tensors)
        # Random, as in training: a slope's partial sums grow and cancel, and magnify harmless rounding.
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        of_state, of_parameters = run.vjp(grad.to(output))

        def gradient(found: Tensor | None, of: Tensor) -> Tensor:
            return torch.zeros_like(of) if found is None else found  # None: it was dropped

        # Of some parameters the gradient is zero but for rounding: the whole vector is compared.
        parameters = step.submodule.named_parameters()
        vector = torch.cat([gradient(of_parameters.get(name), p).flatten() for name, p in parameters])
        states = [gradient(of_state.get(name), tensors[name]) for name in step.submodule.reads]
        return [output, *states, vector]

    pairs = zip(results(strategy), results(WHOLE), strict=True)
    # Of tensors: Python's max would overlook what is not a number.
    return float(torch.stack([_relative_error(got, true) for got, true in pairs]).max())


def _relative_error(got: Tensor, true: Tensor) -> Tensor:
    smallest = torch.finfo(true.dtype).tiny  # what should be zero is compared with nothing
    return ((got - true).abs().max() / true.abs().max().clamp_min(smallest)).double()


def bytes_taken(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    casting: Casting = nullcontext,
) -> MeasuredBytes:
    """What the device's allocator counts in a step's runs, one by one."""
    (discard, *recorded), target_bytes = _phases(step, strategy, state, constants, measure.usage, casting)
    if not recorded:
        return MeasuredBytes(discard.peak, 0, 0, 0)
    forward, backward, _ = recorded
    return MeasuredBytes(discard.peak, forward.peak, max(0, forward.left - target_bytes), backward.peak)
