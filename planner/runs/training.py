"""A model's program under a plan, its optimizer, and one step of either on this process's share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.static import OPTIMIZER_STATES
from evoplan.model.build import build_model, program_type
from evoplan.model.data.batch import Batch
from evoplan.model.running.context import autocast
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.plans.plan import Plan
from evoplan.planner.processes.world import World
from evoplan.planner.runs.step import run_step, share_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Training:
    """What a run trains, or infers with.

    All ranks start with the parameters that `seed` gives. Gradients are summed over the ranks of a replica,
    whose losses are parts of a sum, and averaged over replicas.

    Attributes:
        parameters: by the names that they have without a plan, so that snapshots fit any world.
        static_bytes: of parameters, their gradients and the optimizer's states.
    """

    def __init__(self, plan: Plan, world: World, seed: int, learning_rate: float) -> None:
        problem = plan.problem
        self.plan, self.world, self.training = plan, world, problem.training
        torch.manual_seed(seed)
        stack = build_model(problem.config)
        model = program_type(problem.config)(problem.config, stack)
        self.loss_name = model.loss_name
        model = model.to(world.device, getattr(torch, problem.dtype))
        self.parameters = dict(model.named_parameters())
        planned = apply_plan(stack, plan, world.group if problem.ranks > 1 else None)
        self.share = share_of(planned)
        model.stack = planned
        self.program: nn.Module = model.train(self.training)
        copies = 2 + OPTIMIZER_STATES[problem.optimizer] if self.training else 1
        self.static_bytes = copies * sum(p.nbytes for p in self.parameters.values())
        kind = world.device.type
        self.casting: Casting = partial(autocast, kind, problem.autocast)
        self.scaler = torch.amp.GradScaler(kind) if problem.mixed == "fp16-mixed" else None
        self.optimizer: torch.optim.Optimizer | None = None
        if not self.training:
            return
        if world.mesh is None:
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        else:
            self.program = data_parallel(self.program, world)
        self.optimizer = self._optimizer(problem.optimizer, learning_rate)

    @property
    def live_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer states, as they will be after the first update."""
        tensors = [
            *self.parameters.values(),
            *(p.grad for p in self.parameters.values() if p.grad is not None),
        ]
        for states in self.optimizer.state.values() if self.optimizer else ():
            tensors += [state for state in states.values() if state.numel() > 1]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return max(sum(storages.values()), self.static_bytes)

    def step(self, batch: Batch, dropout_seed: int) -> float:
        """This process's part of the loss; when training, gradients are those of the whole world then."""
        how = self.share, self.casting, self.scaler
        loss = run_step(self.program, batch, self.training, dropout_seed, *how)
        self.world.settle()
        return float(loss)

    def update(self) -> None:
        """Let the optimizer move the parameters."""
        if self.optimizer is not None and self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer is not None:
            self.optimizer.step()

    def notes(self) -> dict[str, Any] | None:
        """What a snapshot keeps besides tensors: where the scale of the loss stands."""
        return None if self.scaler is None else self.scaler.state_dict()

    def restore(self, notes: dict[str, Any] | None) -> None:
        """Go on from such notes."""
        if self.scaler is not None and notes:
            self.scaler.load_state_dict(notes)

    def checksum(self) -> int:
        """Of the parameters' bits: equal on ranks that are in step."""
        total: int | torch.Tensor = 0
        for index, parameter in enumerate(self.parameters.values(), start=1):
            bits = parameter.detach().view(_INTEGERS[parameter.element_size()])
            total = total + index * bits.sum(dtype=torch.int64)  # stays on the device
        return int(total) % 2**62

    def finite(self) -> bool:
        """Whether all parameters are."""
        return all(bool(p.isfinite().all()) for p in self.parameters.values())

    def _optimizer(self, name: str, learning_rate: float) -> torch.optim.Optimizer | None:
        parameters = list(self.parameters.values())
        makers: dict[str, Callable[[], torch.optim.Optimizer | None]] = {
            "none": lambda: None,
            "sgd": lambda: torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9),
            # Fused: no temporaries of the parameters' size.
            "adamw": lambda: torch.optim.AdamW(parameters, lr=learning_rate, fused=True),
        }
        return makers[name]()


def data_parallel(program: nn.Module, world: World, find_unused: bool = True) -> DistributedDataParallel:
    """The program with gradients summed over the ranks of a replica and averaged over replicas.

    Args:
        find_unused: whether some parameters may get no gradient.
    """
    parallel = DistributedDataParallel(
        program,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Nothing depends on a masked-MSA model's last pair steps. It also keeps the buckets as they are made
        # first; rebuilt ones would be there beside them for a while.
        find_unused_parameters=find_unused,
    )
    parallel.register_comm_hook(world, _sum_of_ranks_mean_of_replicas)
    return parallel


def dropout_seed(seed: int, number: int) -> int:
    """Of a batch: the same on all ranks of a replica, and on a resumed run."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 2)


# Not annotated: DDP reads annotations, and those of this file are texts.
def _sum_of_ranks_mean_of_replicas(world, bucket):  # type: ignore[no-untyped-def]
    # Where no gradient came, DDP would leave none; the optimizer is to see zeros, as it does in one process.
    for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if parameter.grad is None:
            parameter.grad = grad
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    world.works.append(work)
    replicas = world.replicas
    return work.get_future().then(lambda done: done.value()[0].div_(replicas))
