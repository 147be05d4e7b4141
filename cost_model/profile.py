"""Measuring the times of steps on this machine, one strategy after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median, quantiles

import torch
from torch import Tensor

from cost_model import measure
from cost_model.times import MeasuredBytes, Timing
from model.chain import Step
from model.execution import record, run_discarded
from model.strategy import WHOLE, Strategy
from model.submodule import Submodule

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
) -> dict[Strategy, Timing]:
    """Median times of a step under each strategy.

    Each round times them all, because a machine's speed drifts. Every time is that of the second of two
    runs in a row: what a step finds in caches and in the allocator's hands is its own, as in a stack.

    Args:
        step: with data, on the device of the state; in training mode if backward is wanted.
        state, constants: real tensors that the step reads.
        repeats: timed runs of each.
    """
    kind = next(iter(state.values())).device.type
    found: dict[Strategy, list[tuple[float, float, float]]] = {strategy: [] for strategy in strategies}
    for number in range(repeats):
        for strategy, times in found.items():
            progress(f"{step.name} {strategy}, round {number + 1} of {repeats}")
            _once(step, strategy, state, constants, kind)
            times.append(_once(step, strategy, state, constants, kind))
    return {strategy: _timing(times) for strategy, times in found.items()}


def _once(
    step: Step,
    strategy: Strategy,
    state: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    kind: str,
) -> tuple[float, float, float]:
    """Seconds of a discarding run, a recorded forward and its backward."""
    seed = 0 if step.submodule.training else None  # a dropout mask is drawn in every run
    kept: list = []

    def discard() -> None:
        with torch.no_grad():
            run_discarded(step.submodule, strategy, step.tensors(state, constants, seed))

    def forward() -> None:
        kept.extend(record(step.submodule, strategy, step.tensors(state, constants, seed)))

    discarded = measure.seconds(discard, kind)
    if seed is None:
        return discarded, 0.0, 0.0
    recorded = measure.seconds(forward, kind)
    run, output = kept
    grad = torch.randn_like(output)
    del output
    kept.clear()
    return discarded, recorded, measure.seconds(lambda: run.vjp(grad), kind)


def _timing(times: list[tuple[float, float, float]]) -> Timing:
    discard, forward, backward = (median(phase) for phase in zip(*times, strict=True))
    totals = [sum(phases) for phases in times]
    low, _, high = quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
    return Timing(discard, forward, backward, (high - low) / median(totals))


def largest_error(
    step: Step, strategy: Strategy, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> float:
    """How far a strategy's results and gradients are from those of a whole run, over the largest of each."""
    seed = 0 if step.submodule.training else None

    def results(strategy: Strategy) -> list[Tensor]:
        tensors = step.tensors(state, constants, seed)
        if seed is None:
            with torch.no_grad():
                return [run_discarded(step.submodule, strategy, tensors)]
        run, output = record(step.submodule, strategy, tensors)
        grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        of_state, of_parameters = run.vjp(grad.view_as(output))

        def gradient(found: Tensor | None, of: Tensor) -> Tensor:
            return torch.zeros_like(of) if found is None else found  # None: it was dropped

        # Of some parameters the gradient is zero but for rounding: the whole vector is compared.
        parameters = step.parameters.items()
        vector = torch.cat([gradient(of_parameters.get(name), p).flatten() for name, p in parameters])
        states = [gradient(of_state.get(name), tensors[name]) for name in step.submodule.reads]
        return [output, *states, vector]

    pairs = zip(results(strategy), results(WHOLE), strict=True)
    return max(float((got - true).abs().max() / true.abs().max()) for got, true in pairs)


def bytes_taken(
    step: Step, strategy: Strategy, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> MeasuredBytes:
    """What the device's allocator counts in a step's runs, one by one."""
    kind = next(iter(state.values())).device.type
    seed = 0 if step.submodule.training else None
    kept: list = []

    def discard() -> None:
        with torch.no_grad():
            kept.append(run_discarded(step.submodule, strategy, step.tensors(state, constants, seed)))

    def forward() -> None:
        kept.extend(record(step.submodule, strategy, step.tensors(state, constants, seed)))

    discarded = measure.usage(discard, kind)
    output_bytes = kept.pop().untyped_storage().nbytes()
    if seed is None:
        return MeasuredBytes(discarded.peak, 0, 0, 0)
    recorded = measure.usage(forward, kind)
    run, output = kept
    grad = torch.randn_like(output)
    kept.clear()
    del output
    backward = measure.usage(lambda: run.vjp(grad), kind)
    return MeasuredBytes(discarded.peak, recorded.peak, max(0, recorded.left - output_bytes), backward.peak)
