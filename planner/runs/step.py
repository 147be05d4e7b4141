"""The program that `run` runs around a plan's stack: its step, and what that needs."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from evoplan.cost_model.casting import Casting, casting_of
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.simulation import simulated
from evoplan.model.build import build_model, program_type
from evoplan.model.data.batch import Batch
from evoplan.model.programs.program import Part
from evoplan.model.running.chain import Plannable
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.host import FakeHost
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import device_of, planned_model

# What a rank is given of the state, and what it makes of the results.
Share = tuple[Part | None, Part | None]


def share_of(planned: PlannedModule) -> Share:
    """The share that a planned model runs: all, unless ranks share it."""
    model = planned.stack
    if not isinstance(model, ParallelEvoformer):
        return None, None
    return model.spans(model.input_cuts), model.spans(model.output_cuts)


def run_step(
    program: nn.Module,
    batch: Batch,
    training: bool,
    dropout_seed: int | None = None,
    share: Share = (None, None),
    casting: Casting = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """The loss of one step; in training, gradients are left in the parameters' own.

    Args:
        program: a `model.programs.program.Program`, or what calls it.
        share: of the model around which it is; the loss is a part of a sum then.
        casting: what forward runs under, and backward does not.
        scaler: of the loss, whose gradients half precision would lose.
    """
    loss: Tensor
    if not training:
        with torch.no_grad(), casting():
            loss = program(batch, *share)
        return loss
    for parameter in program.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    with casting():
        loss = program(batch, *share, dropout_seed)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def simulated_peak_bytes(plan: Plan, batch: Batch, rank: int = 0) -> int:
    """Most bytes that a step takes above the parameters, their training state and the batch.

    The program runs on fake tensors. The plan's own prediction is of its model alone, with a loss that reads
    both outputs: here there are the features and the logits besides, and no gradient of the last z.

    Args:
        batch: only shapes and dtypes count.
        rank: of those that share the model.
    """
    problem = plan.problem
    where, dtype = device_of(problem), getattr(torch, problem.dtype)
    with torch.device("meta"):
        plain = program_type(problem.config)(problem.config, build_model(problem.config))
    with simulated(where) as trace:
        model = fake_copy(plain, dtype).train(problem.training)
        assert isinstance(model.stack, Plannable)  # a copy of the one that was built
        share = planned_model(problem, rank, model.stack)
        planned = PlannedModule(share, plan.schedule, partial(FakeHost, trace), problem.donate)
        model.stack = planned
        batch = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
        for parameter in model.parameters() if problem.training else ():
            parameter.grad = torch.zeros_like(parameter)
        before = trace.live_bytes
        trace.reset()
        casting = casting_of(where.kind, problem.autocast)
        run_step(model, batch, problem.training, 0, share_of(planned), casting)
        return trace.peak_bytes - before
