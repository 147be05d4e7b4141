"""Inference: state written over and state on the host change no result, and cost what is predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evoplan.cost_model import measure
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Work
from evoplan.model import Chain, EvoformerConfig, EvoformerStack, EvoformerTrunk, InputShape, TrunkConfig
from evoplan.model.build import build_model
from evoplan.model.config import ModelConfig
from evoplan.model.running.chain import Plannable
from evoplan.model.running.execution import run_discarded
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner import NoPlanError, simulate_plan, verify_plan
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.departures import StateAway
from evoplan.planner.execution.host import Host
from evoplan.planner.plans.plan import load_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.replay import Replay, replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, all_runs
from evoplan.planner.schedules.text import schedule_from_json, schedule_to_json
from evoplan.planner.schedules.waiting import may_wait
from evoplan.planner.solvers import InfeasibleError
from evoplan.planner.solvers.inference import inference_schedule
from tests.conftest import TINY, TINY_EXTRA, random_inputs, randomise
from tests.test_apply import random_strategy
from tests.test_dp import cases
from tests.test_execution import CASES, strategies, tensors_for

# Triangles need the most, so that m may wait on the host when it matters.
CONFIG = EvoformerConfig(2, 24, 20, 4, 2, 8, 8, 40, 2, c_head_msa=8)
TRUNK = TrunkConfig(replace(TINY_EXTRA, n_block=1, c_m=8), TINY)


def trunk_inputs() -> dict[str, torch.Tensor]:
    """Of TRUNK, all leaves detached."""
    main = random_inputs(TINY)
    extra = random_inputs(TRUNK.extra, s=11, seed=1)
    inputs = {**main, "e": extra["m"], "extra_mask": extra["msa_mask"]}
    return {name: tensor.detach() for name, tensor in inputs.items()}


def model_and_inputs(trunk: bool, train: bool = False) -> tuple[Plannable, dict[str, torch.Tensor]]:
    if trunk:
        return randomise(EvoformerTrunk(TRUNK).double()).train(train), trunk_inputs()
    inputs = {name: tensor.detach() for name, tensor in random_inputs(TINY, batch=(2,)).items()}
    return randomise(EvoformerStack(TINY).double()).train(train), inputs


def random_runs(planned: PlannedModule, rng: Random) -> Sequence:
    """Random strategies; whatever may wait on the host often does."""
    return Sequence(
        tuple(
            Run(
                step.index,
                random_strategy(step, rng),
                tuple(name for name in may_wait(planned.liveness, step.index) if rng.random() < 0.7),
            )
            for step in Chain.of(planned.stack).steps
        )
    )


# --- in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,)], ids=["single", "batch"])
@pytest.mark.parametrize(("config", "name"), CASES)
def test_pieces_written_over_the_target(config: ModelConfig, name: str, batch: tuple[int, ...]) -> None:
    stack = randomise(build_model(config).double(), seed=1)
    submodule = dict(stack.blocks[0].submodules())[name]
    given = tensors_for(stack, submodule, random_inputs(config, batch=batch))
    with torch.no_grad():
        expected = run_discarded(submodule, WHOLE, given)
        for strategy in strategies(submodule, given):
            tensors = {name: tensor.clone() for name, tensor in given.items()}
            target = tensors[submodule.target]
            got = run_discarded(submodule, strategy, tensors, in_place=True)
            assert (got.data_ptr() == target.data_ptr()) == strategy.in_pieces, strategy
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            for other in tensors.keys() - {submodule.target}:
                assert torch.equal(tensors[other], given[other]), f"{strategy} changed {other}"
            tensors = {name: tensor.clone() for name, tensor in given.items()}
            run_discarded(submodule, strategy, tensors)
            assert torch.equal(tensors[submodule.target], given[submodule.target])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("trunk", [False, True], ids=["stack", "trunk"])
def test_the_callers_tensors_are_left_alone(trunk: bool, seed: int) -> None:
    """Same outputs under any strategies, with dropout too, and whatever waits on the host."""
    model, inputs = model_and_inputs(trunk, train=seed % 2 == 0)
    plain = PlannedModule(model, Sequence(tuple(Run(s.index, WHOLE) for s in Chain.of(model).steps)))
    schedule = random_runs(plain, Random(seed))
    assert any(run.away for run in all_runs(schedule))
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs, dropout_seed=3)
        got = PlannedModule(model, schedule)(**inputs, dropout_seed=3)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-11)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_recorded_runs_are_not_in_place(stack: EvoformerStack) -> None:
    """The same pieces under autograd keep every version, which backward reads."""
    schedule = Sequence(tuple(Run(i, Strategy("chunk", "seq", 2)) if i in (0, 9) else Run(i, WHOLE)
                              for i in range(18)))  # fmt: skip
    inputs = random_inputs(TINY)
    losses = [sum(x.square().mean() for x in model(**inputs, dropout_seed=1))
              for model in (stack, PlannedModule(stack, schedule))]  # fmt: skip
    expected, got = (torch.autograd.grad(loss, [inputs["m"], *stack.parameters()]) for loss in losses)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_only_what_the_chain_made_is_written_over() -> None:
    """The first writer of each tensor costs a new one; later ones cost that much less."""
    problem = Problem(model="custom", config=CONFIG, shape=InputShape(9, 17), mode="inference")
    table = cost_problem(problem).table
    for step, tensor in ((2, "m"), (8, "z")):  # transitions: no context, so pieces are all they hold
        later = next(c for c in table.options[step] if c.strategy.kind == "chunk" and c.strategy.n == 8)
        assert later.discard_bytes < table.state_bytes[tensor]
    for step, tensor in ((0, "m"), (3, "z")):
        first, later = table.options[step], table.options[step + 9]
        for a, b in zip(first, later, strict=True):
            if a.strategy == WHOLE:
                assert a == b
            elif a.strategy.kind == "chunk":
                assert a.discard_bytes - b.discard_bytes == table.state_bytes[tensor]


# --- predicted, simulated, measured -------------------------------------------------------------


@pytest.fixture(scope="module", params=["stack", "trunk"])
def costed(request: pytest.FixtureRequest) -> Costed:
    config, shape = CONFIG, InputShape(9, 17)
    if request.param == "trunk":
        extra = replace(CONFIG, n_block=1, c_m=16, column_attention="global")
        config, shape = TrunkConfig(extra, CONFIG), InputShape(9, 17, n_extra=21)
    return cost_problem(
        Problem(model="custom", config=config, shape=shape, dtype="float64", mode="inference")
    )


def asked(costed: Costed, budget: int, host: bool) -> Costed:
    """With another budget, and a host or none. The CPU has none: tests lend it one."""
    problem = costed.problem.model_copy(update={"budget_bytes": budget})
    return replace(costed, problem=problem, table=replace(costed.table, host_bandwidth=1e9 if host else None))


def least(costed: Costed, host: bool) -> int:
    with pytest.raises(NoPlanError) as caught:
        solve(asked(costed, 1, host))
    return caught.value.least_feasible_bytes


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("more", [1.0, 1.2, 3.0])
def test_peaks_are_as_predicted(costed: Costed, host: bool, more: float) -> None:
    plan = solve(asked(costed, int(more * least(costed, host)), host))
    waits = any(run.away for run in all_runs(plan.schedule))
    assert waits if host and more == 1.0 else more == 1.2 or not waits
    predicted = plan.predicted.peak_bytes
    assert simulate_plan(plan).measured_peak_bytes == predicted
    found = verify_plan(None, plan, repeats=1)
    assert found.ok
    assert found.max_loss_error < 1e-12
    assert predicted - 64 <= found.measured_peak_bytes <= predicted


@pytest.mark.parametrize("more", [1.0, 100.0])
def test_half_precision_peaks_are_as_predicted(more: float) -> None:
    """Products pack their factors then: outer products, the largest of them, at the second."""
    problem = Problem(
        model="custom",
        config=replace(CONFIG, c_tri=16),
        shape=InputShape(9, 17),
        dtype="bfloat16",
        mode="inference",
    )
    costed = cost_problem(problem)
    plan = solve(asked(costed, int(more * least(costed, False)), False))
    predicted = plan.predicted.peak_bytes
    assert simulate_plan(plan).measured_peak_bytes == predicted
    measured = verify_plan(None, plan, repeats=1).measured_peak_bytes
    assert predicted - 64 <= measured <= predicted


def test_the_host_lowers_the_least_budget(costed: Costed) -> None:
    """And at the least budget a plan exists, at one byte less none."""
    with_host, without = least(costed, True), least(costed, False)
    assert with_host < without
    for host, budget in ((True, with_host), (False, without)):
        assert solve(asked(costed, budget, host)).predicted.peak_bytes == budget
        with pytest.raises(NoPlanError, match=r"what stands in the way: discard of .*blocks"):
            solve(asked(costed, budget - 1, host))


def test_gap_is_zero(costed: Costed) -> None:
    assert solve(asked(costed, 2**40, True)).solver.gap == 0.0
    assert solve(asked(costed, 2**40, True), "none").solver.gap is None


def test_a_host_keeps_tensors_off_the_device() -> None:
    """Also where the CPU stands in for one: what waits is not counted, and comes back as it was."""
    given = {"m": torch.randn(5, 7, 12).bfloat16(), "z": torch.randn(7, 5, 10).transpose(0, 1)}
    state, host = {name: tensor.clone() for name, tensor in given.items()}, StateAway(Host())
    assert measure.peak_bytes(lambda: host.move(state, ("m", "z"), ())) == 0
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in state.values())
    size = sum(tensor.nbytes for tensor in given.values())
    assert measure.peak_bytes(lambda: host.move(state, (), ("z", "m"))) == size
    for name, tensor in given.items():
        assert torch.equal(state[name], tensor)


# --- the solver ---------------------------------------------------------------------------------


@st.composite
def inference_tables(draw: st.DrawFn) -> CostTable:
    """Random chains over two or three tensors, some of them donated, one or two strategies per step, and in
    some a host.
    """
    rng = Random(draw(st.integers(0, 2**32)))
    streams = draw(st.sampled_from(["mz", "emz"]))
    state = {name: rng.randint(1, 9) for name in streams}
    reads, options = [], []
    for step in range(draw(st.integers(len(streams), 5))):
        target = streams[step] if step < len(streams) else rng.choice(streams)
        reads.append((target, *(n for n in streams if n != target and rng.random() < 0.2)))
        kinds = (WHOLE, Strategy("chunk", "row", 2))[: rng.randint(1, 2)]
        options.append(
            tuple(
                StepCost(k, 0, 0, 0, state[target] + rng.randint(0, 9), *(Work(),) * 3, rng.randint(1, 9))
                for k in kinds
            )
        )
    return CostTable(
        options=tuple(options),
        step_reads=tuple(reads),
        groups=(range(len(reads)),),
        state_bytes=state,
        loss_bytes=0,
        training=False,
        outputs=tuple(name for name in streams if rng.random() < 0.8),
        host_bandwidth=rng.choice([None, 0.5, 2.0, 2.0, 5.0]),
        donated=rng.random() < 0.5,
    )


def every_schedule(table: CostTable) -> Iterator[Replay]:
    """Judged by the replay alone."""
    per_step = []
    for step, options in enumerate(table.options):
        read = set(table.step_reads[step])
        alive = table.liveness.alive(step)
        own = [v.tensor for v in alive if (table.donated or v.maker >= 0) and v.tensor not in read]
        own = own if table.host_bandwidth else []
        sets = [c for n in range(len(own) + 1) for c in combinations(own, n)]
        per_step.append([Run(step, cost.strategy, away) for cost in options for away in sets])
    for runs in product(*per_step):
        yield replay(Sequence(runs), table)


@cases(250)
@given(inference_tables())
def test_it_finds_the_optimum(table: CostTable) -> None:
    """At every budget at which another schedule begins to fit."""
    played = list(every_schedule(table))
    for budget in sorted({p.peak_bytes for p in played}):
        best = min(p.seconds for p in played if p.peak_bytes <= budget)
        found = replay(inference_schedule(table, budget), table)
        assert found.peak_bytes <= budget
        assert found.seconds == pytest.approx(best)
    least = min(p.peak_bytes for p in played)
    with pytest.raises(InfeasibleError) as caught:
        inference_schedule(table, least - 1)
    assert caught.value.least_bytes == least
    assert replay(inference_schedule(table, None), table).seconds == min(p.seconds for p in played)


# --- what cannot be done ------------------------------------------------------------------------


def away_at(step: int, *names: str, steps: int = 18) -> Sequence:
    return Sequence(tuple(Run(i, WHOLE, names if i == step else ()) for i in range(steps)))


@cache
def tiny_table() -> CostTable:
    return cost_problem(Problem(model="custom", config=TINY, shape=InputShape(5, 7), mode="inference")).table


@pytest.mark.parametrize(
    ("step", "name", "says"),
    [
        (9, "z", "step 9 cannot have z in host memory: the step reads it"),
        (1, "z", "step 1 cannot have z in host memory: it is the caller's input"),
        (10, "q", "step 10 cannot have q in host memory: the state has m, z"),
    ],
)
def test_what_cannot_wait_is_refused(stack: EvoformerStack, step: int, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PlannedModule(stack, away_at(step, name))
    table = replace(tiny_table(), host_bandwidth=1.0)
    with pytest.raises(ValueError, match=says):
        replay(away_at(step, name), table)
    with pytest.raises(ValueError, match="inference only"):
        replay(away_at(10, "z"), replace(table, training=True))
    with pytest.raises(ValueError, match="inference only"):
        replay(away_at(10, "z"), replace(table, host_bandwidth=None))


def test_training_has_no_host(stack: EvoformerStack) -> None:
    planned = PlannedModule(stack, away_at(10, "z"))
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        planned(**random_inputs(TINY))
    with pytest.raises(ValueError, match="inference only"):
        Checkpoint(Sequence((Run(0, WHOLE, ("z",)),)), (WHOLE,))


def test_plan_files(costed: Costed, tmp_path) -> None:
    plan = solve(asked(costed, least(costed, True), True))
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_plan(path) == plan
    schedule = plan.schedule
    written = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(written) == schedule
    assert {len(part) for part in written} == {2, 3}  # as before where nothing is away
    for broken in ([[0, "whole", "z"]], [[0, "whole", []]], [[0, "whole", [1]]], [[0, "whole", ["z"], 1]]):
        with pytest.raises(ValueError, match="no part of a schedule"):
            schedule_from_json(broken)
    training = plan.model_copy(update={"problem": plan.problem.model_copy(update={"mode": "training"})})
    training.save(path)
    with pytest.raises(PlanFileError, match="training cannot"):
        load_plan(path)
