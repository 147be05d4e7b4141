"""Before the first step: the device, the plan if any, and the model on it."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from evoplan.cost_model.devices import Device
from evoplan.experiments.tiny_openfold import output
from evoplan.experiments.tiny_openfold.memory import check_fits, plan_for
from evoplan.experiments.tiny_openfold.options import Options
from evoplan.experiments.tiny_openfold.training import Recipe, TinyTraining
from evoplan.planner.checking.consistency import load_consistent
from evoplan.planner.errors import CommonError
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import device_of
from evoplan.planner.problems.problem import AUTOCAST, Problem
from evoplan.planner.processes.watch import first_line
from evoplan.planner.processes.world import World


def set_up(
    recipe: Recipe, options: Options, world: World, use_amp: bool
) -> tuple[TinyTraining, Plan | None, Device]:
    """The device, the plan if any, and the model on it."""
    say = output.printer(world)
    if world.size > 1 and options.no_data_parallel:
        raise CommonError(f"--no-data-parallel, but torchrun started {world.size} processes; start one")
    device = device_asked(options.device, world)
    world.connect(device.type, world.size)
    world.device = device
    output.print_device(device, world, say)
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
        mixed=next((name for name, dtype in AUTOCAST.items() if dtype == recipe.amp), None),
    )
    plan = _plan(recipe, options, problem, world)
    if plan is not None and options.enable_torch_compile:
        raise CommonError("a plan compiles what it wants compiled; leave --enable-torch-compile out")
    if not options.enable_torch_compile:  # compiled code keeps less, nobody knows how much
        check_fits(recipe, device_of(problem), world, plan)
    training = TinyTraining(
        recipe, world, plan, options.enable_torch_compile and _compiles(recipe, world, say)
    )
    return training, plan, device_of(problem)


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
    if options.memory is not None:
        made = []
        if world.first:
            with Console(stderr=True).status("planning") as status:
                found = plan_for(recipe, problem, options.memory, status.update)
                made.append(found.model_dump(mode="json"))
        return Plan.model_validate(world.gathered_objects(made)[0][0])
    assert options.plan_path is not None
    plan = load_consistent(options.plan_path)
    ours, theirs = (
        (asked.config, asked.shape, asked.precision, asked.mode, asked.ranks)
        for asked in (problem, plan.problem)
    )
    if ours != theirs:
        c, s = recipe.config, problem.shape
        how = f" --precision {problem.mixed}" if problem.mixed else ""
        raise CommonError(
            f"{options.plan_path} is for another model, other shapes or another precision; plan with "
            f"`evoplan plan --model tiny-openfold --n-blocks {c.n_block} --c-m {c.c_m} --c-z {c.c_z} "
            f"--n-seq {s.n_seq} --n-res {s.n_res} --batch {s.batch}{how}`"
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
        say(f"   torch.compile does not work here ({first_line(error)}); running eager.")
        return False
    return True
