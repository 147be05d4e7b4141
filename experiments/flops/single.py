"""One device: counts, timed steps, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from evoplan.cost_model.local import local_cpu, local_cuda
from evoplan.experiments.flops import documents
from evoplan.experiments.flops.counts import analytic, by_deepspeed, counted, counted_step
from evoplan.experiments.flops.output import print_intensity, print_profile
from evoplan.experiments.flops.plot import plot_roofline
from evoplan.experiments.tiny_openfold.memory import check_fits, predict
from evoplan.experiments.tiny_openfold.setup import device_asked
from evoplan.experiments.tiny_openfold.training import WARMUP_STEPS, Recipe, StepResult, TinyTraining
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.planner.files import write_json
from evoplan.planner.problems.costing import Progress
from evoplan.planner.problems.problem import Problem
from evoplan.planner.processes.world import World

PROFILE, INTENSITY, ROOFLINE = "flops_profile.json", "computational_intensity.json", "roofline_data.json"
PICTURE = "roofline.png"


def recipe_of(
    batch_size: int, seq_len: int, num_seqs: int, msa_dim: int, pair_dim: int, num_blocks: int
) -> Recipe:
    """The recipe that the flags of sizes describe."""
    config = TinyOpenFoldConfig(n_block=num_blocks, c_m=msa_dim, c_z=pair_dim)
    shape = InputShape(num_seqs, seq_len, batch_size)
    Problem(model="tiny-openfold", config=config, shape=shape)  # says what is beyond any machine
    return Recipe(config, shape)


def profile_single(
    folder: Path,
    device_name: str | None,
    num_steps: int,
    sizes: Mapping[str, int],
    wanted: set[str],
    update: Progress,
) -> bool:
    """Write flops_profile.json, and what else is wanted: detailed, intensity, roofline.

    Args:
        sizes: by the names of the flags.

    Returns:
        Whether all counters agree.
    """
    recipe, world = recipe_of(**sizes), World()
    world.device = device_asked(device_name, world)
    update("counting")
    formula, whole = analytic(recipe.config, recipe.shape), counted_step(recipe)
    found, works = counted(recipe)
    on_gpu = world.device.type == "cuda"
    device = local_cuda(world.device.index or 0) if on_gpu else local_cpu()
    check_fits(recipe, device, world)
    training = TinyTraining(recipe, world)
    steps = _timed(training, num_steps, update)
    parameters = list(training.parameters.values())
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    profile = documents.flops_document(
        recipe, device, str(world.device), counts, formula, found, whole, by_deepspeed(recipe), works, steps
    )
    write_json(folder / PROFILE, profile)
    print_profile(profile, "detailed" in wanted)
    click.echo(f"\n   Results saved to: {folder / PROFILE}")
    intensity = documents.intensity_document(profile, works, predict(recipe, device), device)
    if "intensity" in wanted:
        write_json(folder / INTENSITY, intensity)
        print_intensity(intensity)
        click.echo(f"   Results saved to: {folder / INTENSITY}")
    if "roofline" in wanted:
        data = documents.roofline_document(profile, intensity, works, device)
        write_json(folder / ROOFLINE, data)
        plot_roofline(data, folder / PICTURE)
        click.echo(f"\nRoofline data: {folder / ROOFLINE}, picture: {folder / PICTURE}")
    return documents.counters_agree(profile) and formula == found


def _timed(training: TinyTraining, num_steps: int, update: Progress) -> list[StepResult]:
    for number in range(WARMUP_STEPS):
        update(f"warm-up, step {number + 1} of {WARMUP_STEPS}")
        training.step(training.batch(number))
    steps = []
    for number in range(WARMUP_STEPS, WARMUP_STEPS + num_steps):
        update(f"step {number - WARMUP_STEPS + 1} of {num_steps}")
        steps.append(training.step(training.batch(number)))
    return steps
