"""Training or inference under a plan, on a real alignment or on random data, alone or on many processes."""

from __future__ import annotations

import hashlib
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from evoplan.cost_model import measure
from evoplan.model.build import program_type
from evoplan.model.data.alignment import Alignment
from evoplan.model.data.batch import Batch
from evoplan.planner.checking.trial import available_bytes, kind_here
from evoplan.planner.checking.verify import PEAK_TOLERANCE
from evoplan.planner.errors import CommonError, RunError
from evoplan.planner.plans.plan import Plan
from evoplan.planner.processes.identity import odd_ones
from evoplan.planner.processes.world import World
from evoplan.planner.reports.checks import print_ranks
from evoplan.planner.reports.tables import describe_problem
from evoplan.planner.runs.data import alignment_for, batch_for
from evoplan.planner.runs.snapshots import Snapshots
from evoplan.planner.runs.step import simulated_peak_bytes
from evoplan.planner.runs.training import Training, dropout_seed
from evoplan.planner.schedules.schedule import opaque_kernels
from evoplan.planner.sizes import exact_size, format_seconds


@dataclass(frozen=True)
class Settings:
    """How to run a plan.

    Attributes:
        msa: a file with an alignment; None for random related sequences.
        skip_bad: leave out its bad sequences, and say how many and why.
        steps: of the whole training, those before a snapshot included.
        learning_rate: of the plan's optimizer (none: the parameters stay).
        replicas: that train together, each on batches of its own.
        snapshots: a folder to write one to every `save_every` steps and after the last, and to resume from.
    """

    steps: int = 3
    msa: str | None = None
    skip_bad: bool = False
    learning_rate: float = 2e-4
    seed: int = 0
    replicas: int = 1
    snapshots: str | None = None
    save_every: int | None = None
    resume: bool = False

    def agreed(self) -> dict[str, str]:
        """What has to be the same on all ranks, by flag."""
        flags = vars(self)
        if self.msa is not None:  # a path may be another file on another machine
            flags = {**flags, "msa": _digest(self.msa)}
        return {f"--{name.replace('_', '-')}": str(value) for name, value in flags.items()}


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError:
        return "no file"  # whoever reads it says so


def run_plan(plan: Plan, settings: Settings, console: Console, world: World | None = None) -> dict[str, Any]:
    """Run the steps; the first rank prints each. Returns what was predicted and measured.

    Raises:
        ValueError: the plan, the alignment or a snapshot does not fit; the message says what to do.
        RunError: the training diverged, on all ranks or on some that it names.
    """
    world = World() if world is None else world
    console = console if world.first else Console(quiet=True)
    problem = plan.problem
    program_type(problem.config)  # says where there is none
    if problem.shape.batch != 1:
        raise ValueError("run takes one alignment at a time; plan with --batch 1")
    alignment = alignment_for(problem, settings.msa, settings.seed, settings.skip_bad, partial(_say, console))
    kind = kind_here(problem)
    world.connect(kind, settings.replicas)
    sharing = world.local_size if kind == "cpu" else 1  # ranks that share this memory
    if plan.predicted.peak_bytes * sharing > available_bytes(kind):
        raise ValueError(
            f"the plan needs {exact_size(plan.predicted.peak_bytes * sharing)}, this machine has "
            f"{exact_size(available_bytes(kind))} free; plan with a smaller --memory or fewer --n-blocks"
        )
    console.print(describe_problem(problem), highlight=False)
    training = Training(plan, world, settings.seed, settings.learning_rate)
    snapshots = _snapshots(plan, settings, world)
    with nullcontext() if snapshots is None else closing(snapshots):
        return _train(plan, settings, training, snapshots, alignment, console)


def _train(
    plan: Plan,
    settings: Settings,
    training: Training,
    snapshots: Snapshots | None,
    alignment: Alignment,
    console: Console,
) -> dict[str, Any]:
    """The steps, from the newest snapshot on, and what came out."""
    problem, world = plan.problem, training.world
    kind = world.device.type
    first = 0 if snapshots is None else _resumed(snapshots, settings, training, console)
    batch = batch_for(problem, alignment, settings.seed)
    beside = plan.static["workspace"] + sum(tensor.nbytes for tensor in batch.values())
    own_plan = (plan.rank_peak_bytes or (plan.predicted.peak_bytes,))[world.part]
    predicted = training.static_bytes + beside + simulated_peak_bytes(plan, batch, world.part)
    around = max(0, predicted - own_plan)  # the plan answers for its model alone

    losses: list[float] = []
    times: list[float] = []
    peak = 0
    measured_at = first + min(1, settings.steps - first - 1)  # once the optimizer has its states
    for index in range(first, settings.steps):
        number = index * settings.replicas + world.replica  # replicas go through the batches together
        batch = batch_for(problem, alignment, settings.seed + number)
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        parts: list[float] = []

        def step(batch: Batch = batch, number: int = number, parts: list[float] = parts) -> None:
            parts.append(training.step(batch, dropout_seed(settings.seed, number)))

        if index == measured_at:
            peak = training.live_bytes + beside + measure.peak_bytes(step, kind)
        else:
            times.append(measure.seconds(step, kind))
        losses.append(_checked_loss(parts[0], training, index, settings.replicas, world))
        training.update()
        clock = (
            f"  {format_seconds(times[-1])}"
            if index != measured_at
            else "  (its memory is measured, not its time)"
        )
        console.print(f"step {index + 1}: {training.loss_name} {losses[-1]:.4f}{clock}", highlight=False)
        every = settings.save_every
        if snapshots and every and ((index + 1) % every == 0 or index + 1 == settings.steps):
            snapshots.save(index + 1, training, training.notes())
    mine = {
        "rank": world.rank,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak,
        "step_seconds": median(times) if times else None,
    }
    of_steps = {"losses": losses, "first_step": first + 1}
    return of_steps | _told(plan, mine, around, world, console)


def _told(plan: Plan, mine: dict[str, Any], around: int, world: World, console: Console) -> dict[str, Any]:
    """Every rank's figures, printed and judged.

    Args:
        mine: this rank's.
        around: bytes that the program takes besides the model that the plan answers for.
    """
    budget, predicted, peak = (
        plan.problem.budget_bytes,
        mine["predicted_peak_bytes"],
        mine["measured_peak_bytes"],
    )
    kind = world.device.type
    # The simulation has a stand-in for kernels that cannot be traced; the plan knows their memory.
    as_predicted = bool(opaque_kernels(plan.schedule)) or abs(peak - predicted) <= PEAK_TOLERANCE * predicted
    ok = as_predicted and (budget is None or peak <= budget + around)
    ranks, oks = zip(*world.gathered_objects((mine, ok)), strict=True)
    print_ranks(list(ranks), plan, kind, console)
    return {
        "backend": f"{kind}-allocator",
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak,
        "predicted_step_seconds": plan.predicted.step_seconds,
        "measured_step_seconds": mine["step_seconds"],
        "ranks": list(ranks),
        "ok": all(oks),
    }


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _snapshots(plan: Plan, settings: Settings, world: World) -> Snapshots | None:
    """Where snapshots go, if anywhere."""
    if settings.snapshots is None:
        return None
    if not plan.problem.training:
        raise CommonError("snapshots are of a training; this plan is for inference")
    problem = plan.problem
    about = {
        "model": problem.model_dump(mode="json")["config"],
        "dtype": problem.precision,
        "optimizer": problem.optimizer,
        "seed": settings.seed,
    }
    return Snapshots(settings.snapshots, about, world)


def _resumed(snapshots: Snapshots, settings: Settings, training: Training, console: Console) -> int:
    """How many steps the training has behind it, once it is where the newest snapshot was."""
    newest = snapshots.newest()
    if not settings.resume:
        if newest:
            raise CommonError(
                f"{settings.snapshots} holds a snapshot of step {newest}; add --resume or name another folder"
            )
        return 0
    if newest >= settings.steps:
        raise CommonError(
            f"the snapshot in {settings.snapshots} is of step {newest}; to go on give more --steps"
        )
    if newest:
        training.restore(snapshots.load(newest, training))
        console.print(f"resumed after step {newest}", highlight=False)
    else:
        console.print(f"no snapshot in {settings.snapshots} yet: from the start", highlight=False)
    return newest


def _checked_loss(part: float, training: Training, index: int, replicas: int, world: World) -> float:
    """The loss of the whole world from this process's part; RunError where ranks went different ways."""
    loss = torch.tensor([part], dtype=torch.float64).view(torch.int64)
    rows = world.gathered(torch.cat([loss, torch.tensor([training.checksum()])]))
    losses = rows[:, 0].contiguous().view(torch.float64)
    bad = [rank for rank in range(world.size) if not losses[rank].isfinite()]
    if bad:
        who = "" if len(bad) == world.size else ", ".join(map(world.name, bad)) + ": "
        where = " there alone" if who else ""
        raise RunError(
            f"{who}the loss of step {index + 1} is {float(losses[bad[0]])}{where}; "
            "try a smaller --learning-rate"
        )
    odd = odd_ones(dict(enumerate(rows[:, 1].tolist())))
    if odd:
        who = ", ".join(map(world.name, odd))
        raise RunError(f"{who}: parameters differ from the other ranks' at step {index + 1}; start again")
    return float(losses.sum()) / replicas
