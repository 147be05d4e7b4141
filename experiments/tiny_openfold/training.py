"""The model, its optimizer and one training step, on this process's share of the batch."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evoplan.cost_model import measure
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.families.tiny_openfold import Task
from evoplan.model.modules.tiny_openfold import TinyOpenFold, TinyOpenFoldStack
from evoplan.model.programs.tiny_data import tiny_batch
from evoplan.model.running.regions import region
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.plans.plan import Plan
from evoplan.planner.processes.world import World
from evoplan.planner.runs.training import data_parallel

SEED = 42
WARMUP_STEPS = 5  # that train as the others do, but are not timed
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; with the code, all that the losses depend on.

    Attributes:
        shape: the whole batch, which processes share.
        amp: dtype of mixed precision, by name; None: all in float32.
    """

    config: TinyOpenFoldConfig
    shape: InputShape
    learning_rate: float = 3e-4
    task: Task = "random"
    amp: str | None = None
    seed: int = SEED


class StepResult(NamedTuple):
    """The loss of this process's share, and seconds of each phase."""

    loss: float
    forward: float
    backward: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.forward + self.backward + self.optimizer


def deterministic(device: torch.device, seed: int = SEED) -> None:
    """The same numbers in every run on the same kind of machine."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # A help for finding reads of what was never written; it takes a seventh of a step on the CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


class TinyTraining:
    """What a run trains.

    Attributes:
        parameters: by the names that they have without a plan, so that snapshots fit any run.
        model: this process's, without what surrounds it.
    """

    def __init__(
        self, recipe: Recipe, world: World, plan: Plan | None = None, compiled: bool = False
    ) -> None:
        self.recipe, self.world, self.device = recipe, world, world.device
        deterministic(self.device, recipe.seed)
        self.model = TinyOpenFold(recipe.config).to(self.device).train()
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        if plan is not None:
            stack = self.model.stack
            assert isinstance(stack, TinyOpenFoldStack)
            self.model.stack = apply_plan(stack, plan)
        program: nn.Module = self.model
        self.compiled = compiled
        if compiled:
            as_module = torch.compile(program)
            assert isinstance(as_module, nn.Module)  # as what is compiled
            program = as_module
        self.program = program if world.mesh is None else data_parallel(program, world, find_unused=False)
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        # Fused: no temporaries of the parameters' size.
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")

    def batch(self, number: int) -> dict[str, Tensor]:
        """This process's share of a batch, on its device."""
        recipe, world = self.recipe, self.world
        whole = tiny_batch(recipe.config, recipe.shape, recipe.task, recipe.seed, number)
        share = recipe.shape.batch // world.replicas
        own = slice(world.replica * share, (world.replica + 1) * share)
        shares = {
            name: tensor[own].clone() if world.replicas > 1 else tensor for name, tensor in whole.items()
        }
        return {name: tensor.to(self.device) for name, tensor in shares.items()}

    def step(self, batch: dict[str, Tensor]) -> StepResult:
        """One step of the recipe."""
        how = self.optimizer, self.scaler, self.recipe.amp, self.device.type
        result = run_step(self.program, batch, *how)
        self.world.settle()
        return result

    def finite(self) -> bool:
        """Whether all parameters are."""
        return all(bool(p.isfinite().all()) for p in self.parameters.values())

    @property
    def planned(self) -> bool:
        """Whether a plan is in force."""
        return isinstance(self.model.stack, PlannedModule)


def run_step(
    program: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None,
    amp: str | None,
    kind: str,
) -> StepResult:
    """A step of any program, on real tensors or on fake ones.

    Args:
        optimizer, scaler: None to stop before the update: gradients stay, and the loss is not read.
        amp: dtype of mixed precision, by name.
        kind: of device, cpu or cuda.
    """
    kept: list[Tensor] = []

    def forward() -> None:
        dtype = None if amp is None else getattr(torch, amp)
        with torch.autocast(kind, dtype=dtype, enabled=amp is not None), region("forward"):
            kept.append(program(batch["tokens"], batch["pair_features"], batch["distances"]))

    def backward() -> None:
        with region("backward"):
            (scaler.scale(kept[0]) if scaler else kept[0]).backward()

    def update() -> None:
        with region("optimizer"):
            if optimizer is None or scaler is None:
                return
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    phases: tuple[Callable[[], None], ...] = (forward, backward, update)
    times = [measure.seconds(phase, kind) for phase in phases]
    return StepResult(0.0 if optimizer is None else float(kept[0].detach()), *times)
