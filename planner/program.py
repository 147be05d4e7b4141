"""The program that `run` runs, the masked-MSA model around a plan's stack: its step, and what that needs."""

from __future__ import annotations

import torch
from torch import Tensor

from cost_model.scratch import CpuScratch
from cost_model.trace import Trace, fake_copy, fake_tensors
from model.batch import Batch
from model.masked_msa import MaskedMSAModel
from model.pieces import sampled_pieces
from model.trunk import build_model
from planner.apply import PlannedModule
from planner.plan import Plan
from planner.planning import device_named


def run_step(model: MaskedMSAModel, batch: Batch, training: bool, dropout_seed: int | None = None) -> Tensor:
    """The loss of one step; in training, gradients are left in the parameters' own, which must be there."""
    if not training:
        with torch.no_grad():
            return model(batch)
    for parameter in model.parameters():
        parameter.grad.zero_()
    loss = model(batch, dropout_seed=dropout_seed)
    loss.backward()
    return loss.detach()


def simulated_peak_bytes(plan: Plan, batch: Batch) -> int:
    """Most bytes that a step takes above the parameters, their training state and the batch.

    The program runs on fake tensors. The plan's own prediction is of its model alone, with a loss that reads
    both outputs: here there are the features and the logits besides, and no gradient of the last z.

    Args:
        batch: only shapes and dtypes count.
    """
    problem = plan.problem
    where, dtype = device_named(problem.device), getattr(torch, problem.dtype)
    scratch = CpuScratch() if where.name == "cpu" else None
    with torch.device("meta"):
        plain = MaskedMSAModel(problem.config, build_model(problem.config))
    with fake_tensors(), Trace(where.block_bytes, scratch) as trace, sampled_pieces(trace):
        model = fake_copy(plain, dtype).train(problem.training)
        model.stack = PlannedModule(model.stack, plan.sequence())
        batch = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
        for parameter in model.parameters() if problem.training else ():
            parameter.grad = torch.zeros_like(parameter)
        before = trace.live_bytes
        trace.reset()
        run_step(model, batch, problem.training, dropout_seed=0)
        return trace.peak_bytes - before
