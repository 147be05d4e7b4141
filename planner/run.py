"""Training or inference under a plan, on a real alignment or on random data."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console

from cost_model import measure
from model.masked_msa import MaskedMSAModel
from model.trunk import build_model
from planner.data import alignment_for, batch_for
from planner.plan import Plan
from planner.program import run_step, simulated_peak_bytes
from planner.report import describe_problem
from planner.sizes import format_seconds, format_size
from planner.verify import PEAK_TOLERANCE, apply_plan, available_bytes


def run_plan(
    plan: Plan, msa: str | None, steps: int, learning_rate: float, seed: int, console: Console
) -> dict:
    """Run `steps` steps; prints each and returns what was predicted and measured.

    The peak predicted is that of the whole program, embedding, head and batch included; it may pass the
    plan's budget by what they add to the plan's own prediction.

    Args:
        msa: an A3M or FASTA file; None for random related sequences.
        learning_rate: of the plan's optimizer (none: the parameters stay).
    """
    problem = plan.problem
    if problem.shape.batch != 1:
        raise ValueError("run takes one alignment at a time; plan with --batch 1")
    alignment = alignment_for(problem, msa, seed)
    kind = "cuda" if problem.device != "cpu" and torch.cuda.is_available() else "cpu"
    if plan.predicted.peak_bytes > available_bytes(kind):
        raise ValueError(
            f"the plan needs {format_size(plan.predicted.peak_bytes)}, this machine has "
            f"{format_size(available_bytes(kind))} free; plan with a smaller --memory or fewer --n-blocks"
        )
    console.print(describe_problem(problem), highlight=False)
    torch.manual_seed(seed)
    stack = build_model(problem.config)
    model = MaskedMSAModel(problem.config, stack).to(kind, getattr(torch, problem.dtype))
    model.stack = apply_plan(stack, plan)
    model.train(problem.training)
    optimizer = _optimizer(problem.optimizer, model, learning_rate) if problem.training else None
    states = plan.static["optimizer"] // max(1, plan.static["parameters"])
    copies = 2 + states if problem.training else 1
    first = batch_for(problem, alignment, seed)
    live = copies * sum(p.nbytes for p in model.parameters()) + plan.static["workspace"]
    live += sum(tensor.nbytes for tensor in first.values())
    with console.status("simulating the step"):
        predicted = live + simulated_peak_bytes(plan, first)
    around = max(0, predicted - plan.predicted.peak_bytes)

    losses: list[float] = []
    times: list[float] = []
    peak: int | None = None
    for index in range(steps):
        batch = {name: t.to(kind) for name, t in batch_for(problem, alignment, seed + index).items()}

        def step(batch: dict = batch) -> None:
            losses.append(float(run_step(model, batch, problem.training)))

        if index == min(1, steps - 1):  # once the optimizer has its states
            peak = live + measure.peak_bytes(step, kind)
        else:
            times.append(measure.seconds(step, kind))
        if optimizer is not None:
            optimizer.step()
        clock = f"  {format_seconds(times[-1])}" if times and index != min(1, steps - 1) else ""
        console.print(f"step {index + 1}: masked-MSA loss {losses[-1]:.4f}{clock}", highlight=False)
    assert peak is not None
    budget = problem.budget_bytes
    ok = abs(peak - predicted) <= PEAK_TOLERANCE * predicted and (budget is None or peak <= budget + around)
    seconds = median(times) if times else None
    console.print(
        f"peak: predicted {format_size(predicted)}, measured {format_size(peak)} ({kind}-allocator)"
        + (f", budget {format_size(budget)}" if budget else ""),
        highlight=False,
    )
    if seconds is not None:
        console.print(
            f"step time: predicted {format_seconds(plan.predicted.step_seconds)} ({plan.costs['time']}), "
            f"measured {format_seconds(seconds)}",
            highlight=False,
        )
    return {
        "losses": losses,
        "backend": f"{kind}-allocator",
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak,
        "predicted_step_seconds": plan.predicted.step_seconds,
        "measured_step_seconds": seconds,
        "ok": ok,
    }


def _optimizer(name: str, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer | None:
    makers: dict[str, Callable[[], torch.optim.Optimizer | None]] = {
        "none": lambda: None,
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9),
        # Fused: no temporaries of the parameters' size.
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True),
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return makers[name]()
