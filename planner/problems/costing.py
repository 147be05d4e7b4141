"""A problem with the costs of everything its schedules can be made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch

from evoplan.cost_model.costs import CostTable, build_cost_table
from evoplan.cost_model.devices import Device, device
from evoplan.cost_model.local import local_cuda
from evoplan.cost_model.loss import Loss
from evoplan.cost_model.roofline import reduction_seconds
from evoplan.cost_model.static import static_bytes
from evoplan.cost_model.times import Roofline, TimeSource
from evoplan.model.build import model_without_data
from evoplan.model.running.chain import Chain, Plannable, Step
from evoplan.model.running.strategy import Strategy
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.model.sharing.ranks import Ranks
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence, strategies_used

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Costed:
    """A problem with everything a solver needs to know about it.

    Attributes:
        model: without data; of several ranks, the first one's share of it.
        table: its costs.
        static: what there is besides, part by part.
        times: where its times come from.
    """

    problem: Problem
    model: Plannable
    device: Device
    table: CostTable
    static: dict[str, int]
    times: TimeSource

    @property
    def sources(self) -> dict[str, str]:
        """Where its figures come from."""
        return {"memory": "traced", "time": self.times.name, "torch": torch_version()}

    @property
    def fixed_bytes(self) -> int:
        """Static bytes that are live at every moment: all but the outputs."""
        return sum(self.static.values()) - self.static["outputs"]

    def predict(self, schedule: Sequence) -> Prediction:
        """What a schedule needs, by replay."""
        result = replay(schedule, self.table)
        peak, static = self.fixed_bytes + result.peak_bytes, sum(self.static.values())
        return Prediction(
            peak_bytes=peak,
            static_bytes=static,
            activation_bytes=peak - static,
            step_seconds=result.seconds + self.reduction_seconds,
            host_bytes=result.host_bytes,
        )

    @property
    def unlike_ranks(self) -> bool:
        """Whether the ranks' shards differ in length."""
        return any(length % self.problem.ranks for length in self.problem.lengths())

    @property
    def reduction_seconds(self) -> float:
        """Time of summing the ranks' gradients of the parameters, as if nothing else ran meanwhile."""
        link = self.problem.link_on(self.device)
        return reduction_seconds(self.static["gradients"], self.problem.ranks, link)

    def chain_budget(self) -> int | None:
        """What the budget leaves for the chain."""
        budget = self.problem.budget_bytes
        return None if budget is None else budget - self.fixed_bytes


def torch_version() -> str:
    """Of the torch that traces here, without what it was built for."""
    return torch.__version__.split("+")[0]


def device_of(problem: Problem) -> Device:
    """What a problem is for: its own device, this machine's GPU for `cuda`, or one of the table.

    Raises:
        ValueError: there is none of that name, or it has no figures for the dtype; says what there is.
    """
    where = problem.own_device or (local_cuda() if problem.device == "cuda" else device(problem.device))
    products = problem.autocast or problem.dtype
    if products not in where.peak_flops:
        raise ValueError(f"device {where.name} has no peak_flops for {products}; add it to its file")
    # Nearly all arithmetic of mixed precision is products.
    return replace(where, peak_flops={**where.peak_flops, problem.precision: where.peak_flops[products]})


def planned_model(problem: Problem, rank: int = 0, stack: Plannable | None = None) -> Plannable:
    """What a problem's plan is for: the model, or one rank's share of it.

    Args:
        rank: of ranks that are only imagined.
        stack: the model; made without data and in training mode when not given.
    """
    stack = model_without_data(problem.config) if stack is None else stack
    if problem.ranks == 1:
        return stack
    backend = "gloo" if device_of(problem).kind == "cpu" else "nccl"
    return ParallelEvoformer(stack, Ranks(None, rank, problem.ranks, backend), problem.shape, whole=False)


def input_shapes(problem: Problem, model: Plannable) -> dict[str, tuple[int, ...]]:
    """What forward of a problem's model takes, by name: the state (a rank's shards of it) and whole masks."""
    state = model.input_shapes if isinstance(model, ParallelEvoformer) else problem.state_shapes()
    return {**state, **problem.mask_shapes()}


def cost_problem(
    problem: Problem,
    stack: Plannable | None = None,
    progress: Progress = lambda _: None,
    *,
    rank: int = 0,
    only: Mapping[int, Collection[Strategy]] | None = None,
    times: TimeSource | None = None,
    loss: Loss | None = None,
) -> Costed:
    """Trace the costs of a problem.

    Args:
        stack: the model; made without data from problem.config when not given.
        rank: whose share is costed, of several.
        only: for each step, the strategies that are traced; None: all that it offers.
        times: where times come from; the device's roofline if not given.
        loss: of forward's results, where that is not the mean of their squares.

    Raises:
        MissingTimesError: some step has none.
        ValueError: the loss cannot be traced; says why.
    """
    model = planned_model(problem, rank, stack)
    where = device_of(problem)
    times = times or Roofline(where, problem.precision, problem.link_on(where))

    def chosen(step: Step, _: object) -> list[Strategy]:
        assert only is not None
        return sorted(only[step.index], key=str)

    table = build_cost_table(
        model,
        input_shapes(problem, model),
        problem.dtype,
        where,
        problem.training,
        progress,
        times,
        None if only is None else chosen,
        problem.autocast,
        loss,
        # A rank is given shards, which lie as they were made.
        {given.name: (given.dtype, given.stride if problem.ranks == 1 else None) for given in problem.given},
        problem.donate,
    )
    if problem.host_bytes and table.host_bandwidth is None:
        raise ValueError(
            f"{where.name} has no memory apart from the host's, in which anything could wait; "
            "leave host memory (--host-memory) out"
        )
    table = replace(table, host_bytes=problem.host_bytes or 0)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    outputs = table.bytes_of(table.liveness.outputs)
    static = static_bytes(
        sizes,
        table.input_bytes,
        outputs,
        problem.dtype,
        where,
        problem.optimizer,
        problem.training,
        problem.reserve_bytes,
    )
    return Costed(problem, model, where, table, static, times)


def peaks_of_ranks(costed: Costed, schedule: Sequence) -> tuple[int, ...]:
    """Predicted peak of each rank under one schedule: those whose shards are shorter need less."""
    problem = costed.problem
    known: dict[tuple[int, ...], int] = {}
    peaks, used = [], strategies_used(schedule)
    for rank in range(problem.ranks):
        shards = tuple(Ranks(None, rank, problem.ranks).lengths(size)[rank] for size in problem.lengths())
        if shards not in known:
            whole = getattr(costed.model, "stack", None)
            theirs = cost_problem(problem, whole, rank=rank, only=used) if rank else costed
            known[shards] = theirs.predict(schedule).peak_bytes
        peaks.append(known[shards])
    return tuple(peaks)


def costed_step_name(costed: Costed, step: int) -> str:
    """Qualified name of a step of the model."""
    return Chain.of(costed.model).steps[step].name


def only_whole(costed: Costed) -> tuple[str, ...]:
    """Kinds of steps that offer no pieces: what can be chosen is what to keep and when to run them again."""
    steps = Chain.of(costed.model).steps
    kinds = (
        kind_of(step.name)
        for step, options in zip(steps, costed.table.options, strict=True)
        if not step.submodule.leads_in and not any(option.strategy.in_pieces for option in options)
    )
    return tuple(dict.fromkeys(kinds))


def kind_of(step_name: str) -> str:
    """A step's name without the number of its block: `blocks.3.row_attention` is `row_attention`."""
    stack, _, rest = step_name.partition("blocks.")
    return stack + rest.partition(".")[2]
