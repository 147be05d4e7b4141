"""Plans with something in host memory: what the copies cost, one after the other or beside the steps.

In inference a step waits for the copy before it in any case; in training copies go on beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import UntypedStorage

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
from evoplan.planner.execution.host import Host, Waiting
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import Costed, device_of
from evoplan.planner.problems.problem import Mode, Problem
from evoplan.planner.schedules.offload import waiting_bytes
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.schedules.waiting import moves
from evoplan.planner.sizes import format_seconds, format_size

HOST_BANDWIDTH = 10e9  # bytes per second: what stands in for a link where a processor stands in for a GPU
HOST_BYTES = 64 * 2**30
MODES: tuple[Mode, ...] = ("inference", "training")
ROOM = {"inference": 1.0, "training": 1.3}  # of the least budget
STAY, AWAY, BESIDE = "nothing away", "one after the other", "beside the steps"


class OneAfterTheOther(Host):
    """Each copy is waited for before anything else is launched."""

    def leave(self, storages: Iterable[UntypedStorage]) -> list[Waiting]:
        waiting = super().leave(storages)
        torch.cuda.synchronize()
        return waiting

    def back(self, waiting: Iterable[Waiting]) -> None:
        super().back(waiting)
        torch.cuda.synchronize()


def runs(setting: Setting) -> Runs:
    """A plan that hangs on host memory, of both precisions, for inference and for training."""
    size = setting.sizes.offloaded
    return {
        f"{mode} {precision} {named(size)}": partial(offloaded, setting, precision, mode)
        for mode in MODES
        for precision in PRECISIONS
    }


def offloaded(setting: Setting, precision: str, mode: Mode) -> Row:
    """One schedule three times: with nothing away, and with its copies one way and the other."""
    free_up()
    problem = _with_host(setting.problem(setting.sizes.offloaded, precision, mode))
    if mode == "training":
        problem = problem.model_copy(update={"host_bytes": HOST_BYTES})
    costs = costed(problem)
    plan = plan_within(costs, int(ROOM[mode] * least_bytes(costs)))
    stay = Sequence(tuple(_staying(part) for part in plan.schedule.parts))
    stack = random_stack(problem, setting.device)
    inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), setting.device)
    modules = {STAY: PlannedModule(stack, stay), BESIDE: PlannedModule(stack, plan.schedule)}
    if setting.device == "cuda":
        modules[AWAY] = PlannedModule(stack, plan.schedule, OneAfterTheOther)
    steps: dict[str, Callable[[], None]] = {
        name: Trial(module, problem, inputs).run for name, module in modules.items()
    }
    peaks = {name: _peak(step, setting.device) for name, step in steps.items()}
    times = interleaved(steps, setting.sizes.rounds, setting.device)
    moved = _moved_bytes(costs, plan)
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
    if AWAY not in modules:
        row["skipped"] = f"{AWAY}: copies beside steps need CUDA's streams; {BESIDE}: into the same memory"
    return row


def _staying(part: Run | Checkpoint) -> Run | Checkpoint:
    return replace(part, away=(), wait=()) if isinstance(part, Run) else replace(part, wait=())


def _with_host(problem: Problem) -> Problem:
    """The problem on a device with a host: where a processor stands in for a GPU, on one that has."""
    here: Device = device_of(problem)
    if here.host_bandwidth is not None:
        return problem
    stands_in = replace(here, name="cpu with a host", host_bandwidth=HOST_BANDWIDTH, block_bytes=512)
    return problem.model_copy(update={"device": stands_in.name, "own_device": stands_in})


def _moved_bytes(costs: Costed, plan: Plan) -> int:
    """Both ways."""
    sizes, schedule = costs.table.state_bytes, plan.schedule
    of_inference = sum(sizes[name] for _, put, take in moves(schedule) for name in (*put, *take))
    return of_inference + 2 * sum(waiting_bytes(schedule, costs.table))


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
