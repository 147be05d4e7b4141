"""What a run prints and writes: the original's lines and its performance_summary.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from statistics import mean
from typing import Any

import click
import torch

from evoplan.experiments.tiny_openfold.memory import Memory
from evoplan.experiments.tiny_openfold.options import ProfilerConfig
from evoplan.experiments.tiny_openfold.profiling import system_info
from evoplan.experiments.tiny_openfold.training import Recipe, StepResult, TinyTraining
from evoplan.planner.plans.plan import Plan
from evoplan.planner.processes.world import World
from evoplan.planner.sizes import exact_size

MIB = 2**20
RULE = "=" * 70
BANNER = f"""{"=" * 80}
TINY OPENFOLD
     A small AlphaFold 2 Evoformer, trained and profiled
{"=" * 80}"""

Print = Callable[[str], Any]


def printer(world: World) -> Print:
    """Prints on the first process and nowhere else."""
    return click.echo if world.first else lambda _: None


def model_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration by the original's names."""
    config, shape = recipe.config, recipe.shape
    return {
        "vocab_size": config.n_token,
        "msa_dim": config.c_m,
        "pair_dim": config.c_z,
        "n_evoformer_blocks": config.n_block,
        "n_heads_msa": config.n_head_msa,
        "n_heads_pair": config.n_head_pair,
        "msa_intermediate_dim": config.transition_factor * config.c_m,
        "pair_intermediate_dim": config.transition_factor * config.c_z,
        "outer_product_dim": config.c_opm,
        "max_seq_len": shape.n_res,
        "n_seqs": shape.n_seq,
        "pair_input_dim": config.c_pair_features,
        "dropout": 0.0,
        "norm_eps": 1e-5,
    }


def print_device(device: torch.device, world: World, say: Print) -> None:
    """Where it runs."""
    say("Deterministic execution environment configured")
    say(f"   Device: {'CUDA' if device.type == 'cuda' else 'CPU'}")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        say(f"   GPU: {properties.name}")
        say(f"   Memory: {properties.total_memory / 1e9:.1f} GB")
    if world.size > 1:
        say(f"\n   Multi-GPU mode: {world.size} processes, DDP")
    else:
        say(f"\n   Single GPU mode: Using {device}")


def print_setup(
    training: TinyTraining, steps: int, profiler: ProfilerConfig, plan: Plan | None, say: Print
) -> None:
    """The model and how it is trained."""
    recipe, world = training.recipe, training.world
    count = sum(parameter.numel() for parameter in training.parameters.values())
    say("\nModel Configuration:")
    say(f"   MSA dimension: {recipe.config.c_m}")
    say(f"   Pair dimension: {recipe.config.c_z}")
    say(f"   Evoformer blocks: {recipe.config.n_block}")
    say(f"   MSA sequences: {recipe.shape.n_seq}")
    say(f"   Sequence length: {recipe.shape.n_res}")
    say(f"   Total parameters: {count:,}")
    say(f"   Model size: {count * 4 / 1e6:.1f} MB (FP32)")
    if plan is not None:
        budget = plan.problem.budget_bytes
        within = "no budget" if budget is None else f"a budget of {exact_size(budget)}"
        say(f"   Plan: {plan.solver.name}, {within}")
    say("\nTraining Configuration:")
    say(f"   Training steps: {steps}")
    say(f"   Batch size: {recipe.shape.batch}")
    if world.size > 1:
        say(f"   Processes: {world.size}, {recipe.shape.batch // world.size} samples each (DDP)")
    say(f"   Task: {recipe.task}")
    say(f"   Learning rate: {recipe.learning_rate}")
    say(f"   Mixed precision: {recipe.amp or False}")
    say(f"   Device: {training.device}")
    say(f"   PyTorch Profiler: {profiler.enabled}")
    say(f"   Memory Profiling: {profiler.enable_memory_profiling}")


def step_line(step: int, steps: int, loss: float, result: StepResult, batch: int, peak: int) -> str:
    """One line of the loop; Memory is the peak of a step."""
    return (
        f"Step {step:3d}/{steps} | Loss: {loss:.4f} | Speed: {batch / result.seconds:5.1f} samples/sec | "
        f"Memory: {peak / MIB:6.1f} MB | Time: {result.seconds * 1000:5.1f}ms"
    )


def summary_of(
    losses: list[float], results: list[StepResult], batch: int, peaks: list[int]
) -> dict[str, Any]:
    """Averages over the timed steps that this process has run.

    Args:
        losses: of all timed steps, those before a snapshot included.
        peaks: bytes; on a CPU of one step.
    """
    return {
        "total_samples": batch * len(results),
        "avg_training_speed": mean(batch / result.seconds for result in results),
        "avg_loss": mean(losses[-len(results) :]),
        "final_loss": losses[-1],
        "avg_batch_time": mean(result.seconds for result in results),
        "avg_forward_time": mean(result.forward for result in results),
        "avg_backward_time": mean(result.backward for result in results),
        "avg_optimizer_time": mean(result.optimizer for result in results),
        "peak_memory_mb": max(peaks) / MIB,
        "avg_memory_mb": mean(peaks) / MIB,
    }


def print_summary(summary: dict[str, Any], say: Print) -> None:
    """The end of the loop."""
    say(RULE)
    say("\nPerformance Summary:")
    say(f"   Total samples processed: {summary['total_samples']:,}")
    say(f"   Average training speed: {summary['avg_training_speed']:.1f} samples/sec")
    for what in ("batch", "forward", "backward", "optimizer"):
        say(f"   Average {what} time: {summary[f'avg_{what}_time'] * 1000:.1f} ms")
    say(f"   Average loss: {summary['avg_loss']:.4f}")
    say(f"   Final loss: {summary['final_loss']:.4f}")
    say(f"   Peak memory usage: {summary['peak_memory_mb']:.1f} MB")


def print_memory(predicted: Memory, measured: Memory, say: Print) -> None:
    """The parts of the peak, predicted beside measured."""
    say("\nMemory at the peak of a step (MB):       predicted   measured")
    for name, size in predicted.parts.items():
        title, found = name.replace("_", " ").capitalize(), measured.parts[name]
        say(f"   {title:<35} {size / MIB:11.2f} {found / MIB:10.2f}")
    say(f"   {'Peak':<35} {predicted.peak_bytes / MIB:11.2f} {measured.peak_bytes / MIB:10.2f}")


def document(
    training: TinyTraining,
    steps: int,
    profiler: ProfilerConfig,
    summary: dict[str, Any],
    losses: list[float],
    memory: dict[str, Memory],
) -> dict[str, Any]:
    """performance_summary.json: the original's keys, and besides every loss and the parts of the peak."""
    recipe, now = training.recipe, datetime.now()
    return {
        "version": "evoplan",
        "timestamp": now.strftime("%Y%m%d_%H%M%S"),
        "config": model_config(recipe),
        "profiler_config": asdict(profiler),
        "performance_summary": summary,
        "training_params": {
            "num_steps": steps,
            "batch_size": recipe.shape.batch,
            "learning_rate": recipe.learning_rate,
            "use_amp": recipe.amp is not None,
            "amp_dtype": recipe.amp,
            "task": recipe.task,
            "planned": training.planned,
            "processes": training.world.size,
        },
        "system_info": {**system_info(training.device), "timestamp_iso": now.isoformat()},
        "losses": losses,
        "memory": {name: asdict(found) for name, found in memory.items()},
    }
