"""Inference with state in host memory: what the copies cost, one after the other or beside the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from evoplan.cost_model import measure
from evoplan.cost_model.devices import Device
from evoplan.experiments.gpu.setting import (
    PRECISIONS,
    Row,
    Runs,
    Setting,
    costed,
    free_up,
    least_bytes,
    named,
    plan_within,
)
from evoplan.experiments.interleaved import interleaved
from evoplan.planner.checking.trial import Trial, random_inputs, random_stack
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.problems.costing import device_of
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.schedule import Sequence, all_runs
from evoplan.planner.schedules.waiting import Host, moves
from evoplan.planner.sizes import format_seconds, format_size

HOST_BANDWIDTH = 10e9  # bytes per second: what stands in for a link where a processor stands in for a GPU
STAY, AWAY, BESIDE = "nothing away", "one after the other", "beside the steps"


class Overlapped(Host):
    """Copies to the host run on a stream of their own, beside the steps after them.

    What is copied is freed when its copy is through, and nobody waits for what comes back but the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = torch.cuda.Stream()

    def put(self, name: str, tensor: Tensor) -> None:
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        self._kept[name] = kept, tensor.device

    def take(self, name: str) -> Tensor:
        kept, device = self._kept.pop(name)
        torch.cuda.current_stream().wait_stream(self._stream)
        return kept.to(device, non_blocking=True)


def runs(setting: Setting) -> Runs:
    """The least plan of both precisions."""
    size = setting.sizes.offloaded
    return {f"{precision} {named(size)}": partial(offloaded, setting, precision) for precision in PRECISIONS}


def offloaded(setting: Setting, precision: str) -> Row:
    """One schedule three times: with nothing away, and with its copies one way and the other."""
    free_up()
    problem = _with_host(setting.problem(setting.sizes.offloaded, precision, "inference"))
    plan = plan_within(costed(problem), least_bytes(costed(problem)))
    stay = Sequence(tuple(replace(run, away=()) for run in all_runs(plan.schedule)))
    stack = random_stack(problem, setting.device)
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), setting.device)
    modules = {STAY: PlannedModule(stack, stay), AWAY: PlannedModule(stack, plan.schedule)}
    if setting.device == "cuda":
        modules[BESIDE] = PlannedModule(stack, plan.schedule, host=Overlapped)
    steps: dict[str, Callable[[], None]] = {
        name: Trial(module, problem, inputs).run for name, module in modules.items()
    }
    peaks = {name: _peak(step, setting.device) for name, step in steps.items()}
    times = interleaved(steps, setting.sizes.rounds, setting.device)
    moved = _moved_bytes(problem, plan.schedule)
    row: Row = {
        "predicted_peak_bytes": plan.predicted.peak_bytes,
        "predicted_step_seconds": plan.predicted.step_seconds,
        "moved_bytes": moved,
        "predicted_copy_seconds": moved / (device_of(problem).host_bandwidth or HOST_BANDWIDTH),
        "runs": {
            name: {
                "peak_bytes_above_inputs": peaks[name],
                "seconds": float(np.median(seconds)),
                "quartiles": [float(np.percentile(seconds, q)) for q in (25, 75)],
                "copy_seconds": float(np.median(np.subtract(seconds, times[STAY]))),
            }
            for name, seconds in times.items()
        },
    }
    if BESIDE not in modules:
        row["skipped"] = f"{BESIDE}: copies beside steps need CUDA's streams; {AWAY}: into the same memory"
    return row


def _with_host(problem: Problem) -> Problem:
    """The problem on a device with a host: where a processor stands in for a GPU, on one that has."""
    here: Device = device_of(problem)
    if here.host_bandwidth is not None:
        return problem
    stands_in = replace(here, name="cpu with a host", host_bandwidth=HOST_BANDWIDTH, block_bytes=512)
    return problem.model_copy(update={"device": stands_in.name, "own_device": stands_in})


def _moved_bytes(problem: Problem, schedule: Sequence) -> int:
    sizes = costed(problem).table.state_bytes
    return sum(sizes[name] for _, put, take in moves(schedule) for name in (*put, *take))


def _peak(step: Callable[[], None], device: str) -> int:
    step()
    free_up()
    return measure.peak_bytes(step, device)


def in_words(row: Row) -> str:
    """A line for people."""
    times = ", ".join(
        f"{name} {format_seconds(one['seconds'])} (peak {format_size(one['peak_bytes_above_inputs'])})"
        for name, one in row["runs"].items()
    )
    return f"{format_size(row['moved_bytes'])} moved; {times}"
