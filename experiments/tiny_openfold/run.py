"""A run: the device, the plan, the loop, snapshots, and what comes out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from experiments.tiny_openfold import output
from experiments.tiny_openfold.memory import Memory, measure_parts, measure_peak, plan_for, predict
from experiments.tiny_openfold.profiling import ProfilerConfig, StepProfiler
from experiments.tiny_openfold.training import WARMUP_STEPS, Recipe, StepResult, TinyTraining
from planner.costing import device_of
from planner.errors import CommonError, RunError
from planner.plan import Plan, load_plan, write_json
from planner.problem import Problem
from planner.snapshots import Snapshots
from planner.world import World

if TYPE_CHECKING:
    from experiments.tiny_openfold.__main__ import Options

SUMMARY = "performance_summary.json"


def set_up(
    recipe: Recipe, options: Options, world: World, use_amp: bool
) -> tuple[TinyTraining, Plan | None, Problem]:
    """The device, the plan if any, and the model on it."""
    say = _sayer(world)
    if world.size > 1 and options.no_data_parallel:
        raise CommonError(f"--no-data-parallel, but torchrun started {world.size} processes; start one")
    device = device_asked(options.device, world)
    world.connect(device.type, world.size)
    world.device = device
    b = recipe.shape.batch
    if b % world.size:
        raise CommonError(f"--batch-size {b} does not divide among {world.size} processes; give a multiple")
    if use_amp and recipe.amp is None:
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
        recipe = replace(recipe, amp="float16" if half else "bfloat16")
    problem = Problem(
        model="tiny-openfold",
        config=recipe.config,
        shape=replace(recipe.shape, batch=b // world.size),
        device=device.type,
    )
    plan = _plan(recipe, options, problem, world)
    if plan is not None and options.enable_torch_compile:
        raise CommonError("a plan compiles what it wants compiled; leave --enable-torch-compile out")
    training = TinyTraining(
        recipe, world, plan, options.enable_torch_compile and _compiles(recipe, world, say)
    )
    return training, plan, problem


def device_asked(asked: str | None, world: World) -> torch.device:
    """The device that a flag names; None is the first GPU, or the CPU without one.

    Raises:
        CommonError: there is none of that name; says what to do.
    """
    gpus = torch.cuda.device_count()
    if asked == "cpu" or (asked is None and not gpus):
        return torch.device("cpu")
    if asked in (None, "cuda"):
        if not gpus:
            raise CommonError("--device cuda: no GPU here; leave --device out to run on the CPU")
        return torch.device("cuda", world.local_rank)
    if world.size > 1:
        raise CommonError(f"--device {asked} is for one process; under torchrun each has a GPU of its own")
    if not asked.isdecimal():
        raise CommonError(f"--device {asked}: give the number of a GPU, cpu or cuda")
    if int(asked) >= gpus:
        raise CommonError(f"--device {asked}: {gpus} GPUs here; leave --device out, or give cpu")
    torch.cuda.set_device(int(asked))
    return torch.device("cuda", int(asked))


def _plan(recipe: Recipe, options: Options, problem: Problem, world: World) -> Plan | None:
    """The plan given, or one for the budget; the first process makes it for all."""
    if options.plan_path is None and options.memory is None:
        return None
    if options.plan_path is not None and options.memory is not None:
        raise CommonError("--plan and --memory are two ways to say one thing; give one")
    if recipe.amp is not None:
        raise CommonError("a plan is for one dtype; leave --use-amp out, or the plan")
    if options.memory is not None:
        made = []
        if world.first:
            with Console(stderr=True).status("planning") as status:
                found = plan_for(recipe, problem, options.memory, status.update)
                made.append(found.model_dump(mode="json"))
        return Plan.model_validate(world.gathered_objects(made)[0][0])
    assert options.plan_path is not None
    plan = load_plan(options.plan_path)
    ours, theirs = (
        (asked.config, asked.shape, asked.dtype, asked.mode, asked.ranks) for asked in (problem, plan.problem)
    )
    if ours != theirs:
        c, s = problem.config, problem.shape
        raise CommonError(
            f"{options.plan_path} is for another model or other shapes; plan with `evoplan plan --model "
            f"tiny-openfold --n-blocks {c.n_block} --c-m {c.c_m} --c-z {c.c_z} --n-seq {s.n_seq} "
            f"--n-res {s.n_res} --batch {s.batch}`"
        )
    return plan


def _compiles(recipe: Recipe, world: World, say: output.Print) -> bool:
    """Whether torch.compile works here; says why not."""
    say("   Applying torch.compile optimization...")
    small = replace(recipe, config=replace(recipe.config, n_block=1))
    try:
        trial = TinyTraining(small, World(), compiled=True)
        trial.model.to(world.device)
        trial.device = world.device
        trial.step(trial.batch(0))
    except Exception as error:  # whatever a compiler may raise
        say(f"   torch.compile does not work here ({str(error).splitlines()[0]}); running eager.")
        return False
    return True


@dataclass
class _Course:
    """How far a run has come."""

    losses: list[float] = field(default_factory=list)  # of the timed steps, those before a snapshot included
    results: list[StepResult] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def train(
    training: TinyTraining, plan: Plan | None, problem: Problem, options: Options, profiler: ProfilerConfig
) -> None:
    """The loop, and what comes out of it."""
    world, say = training.world, _sayer(training.world)
    output.print_setup(training, options.num_steps, profiler, plan, say)
    course = _Course()
    snapshots, first = _snapshots(training, options, course, say)
    last = WARMUP_STEPS + options.num_steps
    # Once the optimizer has its states, and best before the timed steps.
    measured_at = min(max(first, WARMUP_STEPS - 1), last - 1)
    memory: dict[str, Memory] = {}
    with ExitStack() as stack:
        show = _progress_bar(stack, last - first, world)
        steps: StepProfiler | None = None
        if first < WARMUP_STEPS:
            say(f"\nRunning {WARMUP_STEPS} warmup steps...")
        for number in range(first, last):
            if number == WARMUP_STEPS:
                say("Warmup complete. Starting measured training loop...")
            if number == max(first, WARMUP_STEPS):
                say(output.RULE)
            timed = number >= WARMUP_STEPS
            if number == measured_at:
                result = _measured_step(training, number, course, memory, problem, plan, profiler)
            else:
                if timed and steps is None:
                    steps = stack.enter_context(StepProfiler(profiler, training.device.type, world.rank))
                result = _step(training, number, course)
            loss = _loss_of_all(result.loss, number, world)
            show()
            if timed:
                _count(course, loss, result, number, options, training, say)
                if steps is not None:
                    steps.step()
                if snapshots is not None and _is_due(number, last, options):
                    notes = {"losses": course.losses, "scaler": training.scaler.state_dict()}
                    snapshots.save(number + 1, training, notes)
    summary = output.summary_of(course.losses, course.results, training.recipe.shape.batch, course.peaks)
    output.print_summary(summary, say)
    if training.compiled and profiler.enable_memory_profiling:
        say("\nCompiled code has no regions: the peak cannot be split, nor predicted.")
    if memory:
        output.print_memory(memory["predicted"], memory["measured"], say)
    if world.first:
        path = Path(profiler.profile_dir) / SUMMARY
        write_json(
            path, output.document(training, options.num_steps, profiler, summary, course.losses, memory)
        )
        say(f"\nPerformance data saved to: {path}")
        if profiler.enabled:
            say(f"PyTorch profiling data saved to: {profiler.profile_dir}")
            say(f"   Launch TensorBoard: tensorboard --logdir {profiler.profile_dir}")
    say("\nTraining completed successfully!")


def _step(training: TinyTraining, number: int, course: _Course) -> StepResult:
    """A step, and on a GPU its peak."""
    kind = training.device.type
    batch = training.batch(number)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = training.step(batch)
    if kind == "cuda":
        course.peaks.append(torch.cuda.max_memory_allocated())
    return result


def _measured_step(
    training: TinyTraining,
    number: int,
    course: _Course,
    memory: dict[str, Memory],
    problem: Problem,
    plan: Plan | None,
    profiler: ProfilerConfig,
) -> StepResult:
    """A step whose peak is measured; with memory profiling also what it is made of."""
    peak, result = measure_peak(training, number)
    course.peaks.append(peak)
    if profiler.enable_memory_profiling and not training.compiled:
        shares = training.world.replicas if training.world.mesh is not None else 1
        memory["predicted"] = predict(training.recipe, device_of(problem), plan, shares)
        memory["measured"] = measure_parts(training, number, peak)
    return result


def _count(
    course: _Course,
    loss: float,
    result: StepResult,
    number: int,
    options: Options,
    training: TinyTraining,
    say: output.Print,
) -> None:
    """Take a timed step down, and print every tenth."""
    step, batch = number - WARMUP_STEPS, training.recipe.shape.batch
    course.losses.append(loss)
    course.results.append(result)
    if step % 10 == 0:
        say(output.step_line(step, options.num_steps, loss, result, batch, course.peaks[-1]))


def _loss_of_all(loss: float, number: int, world: World) -> float:
    """The loss of the whole batch; RunError where it is none."""
    losses = world.gathered(torch.tensor([loss], dtype=torch.float64)).flatten()
    if not losses.isfinite().all():
        raise RunError(
            f"the loss of step {number + 1} is {float(losses.sum())}; try a smaller --learning-rate"
        )
    return float(losses.mean())


def _is_due(number: int, last: int, options: Options) -> bool:
    assert options.save_every is not None
    return (number + 1 - WARMUP_STEPS) % options.save_every == 0 or number + 1 == last


def _snapshots(
    training: TinyTraining, options: Options, course: _Course, say: output.Print
) -> tuple[Snapshots | None, int]:
    """Where snapshots go if anywhere, and how many steps, those of warm-up included, lie behind."""
    if options.save_every is None:
        if options.resume:
            raise CommonError("--resume goes on saving: add --save-every")
        return None, 0
    recipe = asdict(training.recipe)
    snapshots = Snapshots(options.snapshots, recipe, training.world)
    newest = snapshots.newest()
    if newest and not options.resume:
        raise CommonError(
            f"{options.snapshots} holds a snapshot of step {newest - WARMUP_STEPS}; add --resume, or name "
            "another folder with --snapshots"
        )
    if newest >= WARMUP_STEPS + options.num_steps:
        raise CommonError(
            f"the snapshot in {options.snapshots} is of step {newest - WARMUP_STEPS}; to go on give more "
            "--num-steps"
        )
    if newest:
        notes = snapshots.load(newest, training)
        course.losses += notes["losses"]
        training.scaler.load_state_dict(notes["scaler"])
        say(f"\nResumed after step {newest - WARMUP_STEPS}")
    elif options.resume:
        say(f"\nNo snapshot in {options.snapshots} yet: from the start")
    return snapshots, newest


def _progress_bar(stack: ExitStack, total: int, world: World) -> Callable[[], None]:
    """Progress on a terminal; nothing where output goes to a file."""
    if not (world.first and sys.stderr.isatty()):
        return lambda: None
    bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task("training", total=total)
    return lambda: bar.advance(task)


def _sayer(world: World) -> Callable[[str], Any]:
    return click.echo if world.first else lambda _: None
