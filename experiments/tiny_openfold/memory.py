"""The true peak of a training step, predicted on fake tensors and measured, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evoplan.cost_model import measure
from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.ledger import Ledger, Regions
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.static import OPTIMIZER_STATES
from evoplan.experiments.tiny_openfold.training import Recipe, StepResult, TinyTraining, run_step
from evoplan.model.modules.tiny_openfold import MSA_EMBEDDING, TinyOpenFold
from evoplan.model.running.chain import Plannable
from evoplan.model.running.regions import SCORES
from evoplan.planner.checking.trial import available_bytes
from evoplan.planner.errors import CommonError
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import Costed, Progress, cost_problem, kind_of
from evoplan.planner.problems.problem import Problem
from evoplan.planner.processes.world import World
from evoplan.planner.sizes import exact_size

OF_MSA = ("row_attention", "column_attention", "msa_transition", MSA_EMBEDDING)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    Attributes:
        peak_bytes: as the device's allocator counts.
        parts: what it is made of; workspace is what backward holds for a moment (gradients of activations,
            pieces run again) and what operators take besides their results.
    """

    peak_bytes: int
    parts: dict[str, int]


def part_of(regions: Regions) -> str:
    """Which part of the memory a storage belongs to, from the regions that it was made in.

    What is made outside a step and the alignment's embedding (features of pairs, the head, the loss) counts
    to the pair activations.
    """
    if SCORES in regions:
        return "attention_scores"
    inner = regions[-1] if regions else "backward"
    if inner.endswith("backward") or inner == "optimizer":
        return "workspace"
    name = kind_of(inner) if "blocks." in inner else inner
    return "msa_activations" if name in OF_MSA else "pair_activations"


def predict(recipe: Recipe, where: Device, plan: Plan | None = None, shares: int = 1) -> Memory:
    """The peak of a step once the optimizer has its states; nothing is computed.

    Args:
        shares: processes that share a batch; their gradients lie in buckets from step to step.
    """
    with torch.device("meta"):
        plain = TinyOpenFold(recipe.config)
    with simulated(where, Ledger) as ledger:
        model = fake_copy(plain, torch.float32).train()
        if plan is not None:
            assert isinstance(model.stack, Plannable)  # a copy of its own
            model.stack = PlannedModule(model.stack, plan.schedule)
        parameters = list(model.parameters())
        batch = empty_batch(recipe, recipe.shape.batch // shares)
        for parameter in parameters if shares > 1 else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        ledger.reset()
        run_step(model, batch, None, None, recipe.amp, "cpu")  # which fake tensors claim to be on
        states = _states_bytes(parameters)
        peak = ledger.peak_bytes + states + where.workspace_bytes
        return Memory(peak, _parts(ledger, parameters, states, batch, peak))


def check_fits(recipe: Recipe, where: Device, world: World, plan: Plan | None = None) -> None:
    """Refuse a step that this machine's memory cannot hold, before it is tried.

    Raises:
        ValueError: says what it needs, what there is, and what to do.
    """
    sharing = world.local_size if where.kind == "cpu" else 1  # processes that share this memory
    needed = sharing * predict(recipe, where, plan, world.size).peak_bytes
    available = available_bytes(where.kind)
    if needed > available:
        raise CommonError(
            f"a step needs {exact_size(needed)}, this machine has {exact_size(available)} free; "
            "use smaller sizes, or less with --memory"
        )


def measure_peak(training: TinyTraining, number: int) -> tuple[int, StepResult]:
    """The peak of a real step, which trains, by the device's allocator; and that step."""
    batch, results, kind = training.batch(number), [], training.device.type
    before = _live_bytes(training, batch)
    taken = measure.peak_bytes(lambda: results.append(training.step(batch)), kind)
    # A GPU's allocator knows all that is there, its libraries' workspace too.
    peak = torch.cuda.max_memory_allocated() if kind == "cuda" else before + taken
    return peak, results[0]


def measure_parts(training: TinyTraining, number: int, peak: int, where: Device) -> Memory:
    """What a measured peak is made of, by a step that does not train."""
    batch, parameters = training.batch(number), list(training.parameters.values())
    assert training.optimizer is not None

    def step() -> None:
        run_step(training.program, batch, None, None, training.recipe.amp, training.device.type)
        training.world.settle()

    buckets: list[Tensor] = []
    if training.world.mesh is not None:  # in which several processes sum; gradients are views of them
        step()
        buckets = [parameter.grad for parameter in parameters if parameter.grad is not None]
        training.optimizer.zero_grad()
    with Ledger(where.block_bytes) as ledger:
        ledger.given([*parameters, *batch.values(), *buckets])
        step()
    parts = _parts(ledger, parameters, _nbytes(_states(training.optimizer)), batch, peak)
    training.optimizer.zero_grad()
    return Memory(peak, parts)


def plan_for(recipe: Recipe, problem: Problem, budget: int, progress: Progress = lambda _: None) -> Plan:
    """The fastest plan of the stack with which a whole step fits a budget.

    Raises:
        NoPlanError: there is none; says the least budget that has one.
    """
    costed = cost_problem(problem, progress=progress)
    least = _least_bytes(costed)
    where, room = costed.device, budget
    while True:
        try:
            plan = solve(replace(costed, problem=problem.model_copy(update={"budget_bytes": room})))
        except NoPlanError:
            plan = solve(replace(costed, problem=problem.model_copy(update={"budget_bytes": least})))
            needed = predict(recipe, where, plan).peak_bytes
            if needed <= budget:
                return plan
            raise NoPlanError(
                f"no plan fits a step into {exact_size(budget)}; "
                f"the one that needs least takes {exact_size(needed)}",
                needed,
            ) from None
        over = predict(recipe, where, plan).peak_bytes - budget
        if over <= 0:
            return plan
        room = min(room, plan.predicted.peak_bytes) - over


def _least_bytes(costed: Costed) -> int:
    try:
        solve(replace(costed, problem=costed.problem.model_copy(update={"budget_bytes": 1})))
    except NoPlanError as error:
        return error.least_feasible_bytes
    raise AssertionError("a plan in a single byte")


def empty_batch(recipe: Recipe, b: int) -> dict[str, Tensor]:
    """A batch of the right shapes and dtypes; what it holds is left open."""
    s, r = recipe.shape.rows(), recipe.shape.n_res
    return {
        "tokens": torch.empty(b, s, r, dtype=torch.int64),
        "pair_features": torch.empty(b, r, r, recipe.config.c_pair_features),
        "distances": torch.empty(b, r, r, 1),
    }


def _parts(
    ledger: Ledger, parameters: list[nn.Parameter], states: int, batch: Mapping[str, Tensor], peak: int
) -> dict[str, int]:
    """The parts of a peak; what no storage accounts for is workspace."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_region, fresh = ledger.at_peak(gradients)
    parts = {
        "parameters": _nbytes(parameters),
        "gradients": fresh if ledger.made(gradients) else _nbytes(gradients),
        "optimizer_states": states,
        "inputs": _nbytes(batch.values()),
        "msa_activations": 0,
        "pair_activations": 0,
        "attention_scores": 0,
        "workspace": 0,
    }
    for regions, size in by_region.items():
        parts[part_of(regions)] += size
    parts["workspace"] += peak - sum(parts.values())
    return parts


def _live_bytes(training: TinyTraining, batch: Mapping[str, Tensor]) -> int:
    """What is there before a step."""
    parameters = list(training.parameters.values())
    # Between steps there are none, but the buckets in which several processes sum them.
    buckets = 0 if training.world.mesh is None else _nbytes(p for p in parameters if p.requires_grad)
    assert training.optimizer is not None
    return _nbytes([*parameters, *batch.values()]) + buckets + _nbytes(_states(training.optimizer))


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state for states in optimizer.state.values() for state in states.values() if state.numel() > 1]


def _states_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return OPTIMIZER_STATES["adamw"] * _nbytes(p for p in parameters if p.requires_grad)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
