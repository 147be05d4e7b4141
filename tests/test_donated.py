"""Inputs that a step takes: results stay, peaks fall as predicted, the caller's tensors are empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evoplan.cost_model import measure
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import INPUT, Liveness, Version
from evoplan.cost_model.machine import local_name
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Work
from evoplan.model import Chain, EvoformerConfig, EvoformerStack, InputShape, TrunkConfig
from evoplan.model.config import ModelConfig
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner import NoPlanError, apply_plan, make_plan, simulate_plan, verify_plan
from evoplan.planner.checking.consistency import load_consistent
from evoplan.planner.commands.cli import main
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.plans.plan import Plan, load_plan
from evoplan.planner.plans.planning import shorten_plan, solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.holdings import holdings
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Run, Sequence, all_runs
from evoplan.planner.schedules.waiting import may_wait
from evoplan.planner.solvers import InfeasibleError
from evoplan.planner.solvers.inference import inference_schedule
from tests.conftest import TINY, TINY_PAIRFORMER, randomise
from tests.test_inference import CONFIG, asked, least, model_and_inputs, random_runs

SHAPE = InputShape(9, 17)
EXTRA = replace(CONFIG, n_block=1, c_m=16, column_attention="global")
CASES: dict[str, tuple[ModelConfig, InputShape]] = {
    "stack": (CONFIG, SHAPE),
    "trunk": (TrunkConfig(EXTRA, CONFIG), InputShape(9, 17, n_extra=21)),
    "pairformer": (TINY_PAIRFORMER, InputShape(None, 13)),
}


def problem(name: str = "stack", donate: bool = True, **changes: Any) -> Problem:
    config, shape = CASES[name]
    about: dict[str, Any] = {"model": "custom", "config": config, "shape": shape, "dtype": "float64"}
    return Problem(**about | changes, mode="inference", donate=donate)


@pytest.fixture(scope="module", params=list(CASES))
def costed(request: pytest.FixtureRequest) -> Costed:
    return cost_problem(problem(request.param))


def plan_of_stack(host: bool = False, more: float = 1.0) -> Plan:
    costs = cost_problem(problem())
    return solve(asked(costs, int(more * least(costs, host)), host))


def stack_and_inputs() -> tuple[EvoformerStack, dict[str, Tensor]]:
    """Of `plan_of_stack`."""
    torch.manual_seed(5)
    stack = randomise(EvoformerStack(CONFIG).double(), seed=2).eval()
    shapes = CONFIG.state_shapes(SHAPE)
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return stack, inputs


def copies(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


# --- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("trunk", [False, True], ids=["stack", "trunk"])
def test_results_are_the_plain_model_s(trunk: bool, seed: int) -> None:
    """Under any strategies, with dropout too, and whatever waits on the host; masks stay the caller's."""
    model, inputs = model_and_inputs(trunk, train=seed % 2 == 0)
    plain = PlannedModule(
        model, Sequence(tuple(Run(s.index, WHOLE) for s in Chain.of(model).steps)), donated=True
    )
    schedule = random_runs(plain, Random(seed))
    given = copies(inputs)
    with torch.no_grad():
        expected = model(**inputs, dropout_seed=3)
        got = PlannedModule(model, schedule, donated=True)(**given, dropout_seed=3)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for name, tensor in given.items():
        if name in model.config.masks:
            assert torch.equal(tensor, inputs[name])
        else:
            assert tensor.shape == (0,)
            assert tensor.untyped_storage().nbytes() == 0


def test_inputs_may_wait_on_the_host_before_anybody_has_read_them() -> None:
    plain = PlannedModule(
        EvoformerStack(TINY), Sequence(tuple(Run(i, WHOLE) for i in range(18))), donated=True
    )
    assert may_wait(plain.liveness, 1) == ("z",)
    assert any(run.away for run in all_runs(random_runs(plain, Random(0))) if run.step < 3)


def test_pieces_write_the_first_update_into_what_was_given() -> None:
    """So that both results lie where the inputs lay, and no hook sees a tensor change."""
    stack, inputs = stack_and_inputs()
    names = [next(iter(s.submodule.axes)).name for s in Chain.of(stack).steps]
    schedule = Sequence(tuple(Run(i, Strategy("chunk", name, 2)) for i, name in enumerate(names)))
    with torch.no_grad():
        expected = stack(**inputs)
        addresses = {tensor.data_ptr() for tensor in inputs.values()}
        got = PlannedModule(stack, schedule, donated=True)(**inputs)
        assert {tensor.data_ptr() for tensor in got} == addresses
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)

        _, inputs = stack_and_inputs()
        seen: list[Tensor] = []
        before = inputs["m"].clone()
        hook = stack.blocks[0].msa_transition.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        stack.blocks[0].row_attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        got = PlannedModule(stack, schedule, donated=True)(**inputs)
        hook.remove()
    assert torch.equal(seen[0], before)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("donated", [False, True])
def test_what_hooks_on_norms_have_seen_is_not_written_over(donated: bool) -> None:
    """A norm is given the state itself."""
    stack, inputs = stack_and_inputs()
    names = [next(iter(s.submodule.axes)).name for s in Chain.of(stack).steps]
    schedule = Sequence(tuple(Run(i, Strategy("chunk", name, 2)) for i, name in enumerate(names)))
    seen: list[tuple[Tensor, Tensor]] = []
    norm = stack.blocks[0].msa_transition.norms["m"]
    norm.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].clone())))
    with torch.no_grad():
        PlannedModule(stack, schedule, donated=donated)(**inputs)
    assert seen
    assert all(torch.equal(now, then) for now, then in seen)


# --- what cannot be taken -------------------------------------------------------------------


def _requires_gradient(m: Tensor) -> Tensor:
    return m.clone().requires_grad_()


def _not_contiguous(m: Tensor) -> Tensor:
    return m.transpose(1, 2).contiguous().transpose(1, 2)


def _part_of_another(m: Tensor) -> Tensor:
    return torch.cat([m, m])[:1]


def _an_array(m: Tensor) -> Tensor:
    return torch.from_numpy(np.array(m.numpy()))


def _in_shared_memory(m: Tensor) -> Tensor:
    return m.clone().share_memory_()


def _in_inference_mode(m: Tensor) -> Tensor:
    with torch.inference_mode():
        return m.clone()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_requires_gradient, "m cannot be donated: it requires a gradient"),
        (_not_contiguous, "m cannot be donated: it is not contiguous"),
        (_part_of_another, "m cannot be donated: it is a part of a larger tensor"),
        (_an_array, "m cannot be donated: something else holds its memory"),
        (_in_shared_memory, "m cannot be donated: something else holds its memory"),
        (_in_inference_mode, "m cannot be donated: it was made under torch.inference_mode"),
    ],
)
def test_what_cannot_be_taken_is_refused_and_nothing_is(spoil: Callable[[Tensor], Tensor], says: str) -> None:
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, plan_of_stack())
    given = {"z": inputs["z"].clone(), "m": spoil(inputs["m"])}
    with torch.no_grad(), pytest.raises(ValueError, match=says):
        planned(**given)
    assert all(torch.equal(given[name].detach(), inputs[name]) for name in given)


def test_tensors_that_others_look_at_are_refused() -> None:
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, make_plan(stack, inputs, mode="inference", donate=True))
    square = torch.randn(1, 17, 17, 20, dtype=torch.float64)
    view = inputs["z"][0, 0]
    with torch.no_grad():
        with pytest.raises(ValueError, match="z cannot be donated: something else holds its memory"):
            planned(**inputs)
        del view
        mask = square[..., 0]
        given = {"m": inputs["m"], "z": square, "pair_mask": mask}
        with pytest.raises(ValueError, match="z cannot be donated: it shares its memory with another input"):
            planned(**given)
        array = np.from_dlpack(inputs["m"])
        with pytest.raises(ValueError, match="m cannot be donated: something else holds its memory"):
            planned(**inputs)
        del array
        own = stack.blocks[0].pair_transition.norms["z"].weight
        stack.register_buffer("remembered", inputs["m"])
        with pytest.raises(ValueError, match="m cannot be donated: it shares its memory"):
            planned(**inputs)
        del stack.remembered
        planned(**inputs)
    assert own.numel()
    assert [tensor.numel() for tensor in inputs.values()] == [0, 0]


@pytest.mark.parametrize("kind", ["untyped_storage", "storage"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_that_somebody_holds_is_not_taken(kind: str) -> None:
    """Python has one object of a storage, which is not told of what is made of its memory."""
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, plan_of_stack())
    before = inputs["m"].clone()
    held = {"somewhere": getattr(inputs["m"], kind)()}
    with torch.no_grad():
        with pytest.raises(ValueError, match="m cannot be donated: something else holds its memory"):
            planned(**inputs)
        assert torch.equal(inputs["m"], before)
        assert held.popitem()[1].nbytes() == before.nbytes
        planned(**inputs)
    assert [tensor.numel() for tensor in inputs.values()] == [0, 0]


def test_what_a_graph_needs_for_its_backward_is_refused() -> None:
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, plan_of_stack())
    weight = torch.ones(24, dtype=torch.float64, requires_grad=True)
    loss = (inputs["m"] * weight).sum()
    with torch.no_grad(), pytest.raises(ValueError, match="m cannot be donated: something else holds"):
        planned(**inputs)
    loss.backward()
    torch.testing.assert_close(weight.grad, inputs["m"].sum((0, 1, 2)))
    with torch.no_grad():
        planned(**inputs)


def test_tensors_of_another_dtype_are_not_taken() -> None:
    """The first step would fail, and they would be gone."""
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, plan_of_stack())
    single = {name: tensor.float() for name, tensor in inputs.items()}
    before = {name: tensor.clone() for name, tensor in single.items()}
    with torch.no_grad(), pytest.raises(ValueError, match=r"m cannot be donated: it is torch\.float32"):
        planned(**single)
    assert all(torch.equal(single[name], before[name]) for name in single)


def test_one_tensor_is_not_taken_twice() -> None:
    config = replace(TINY, c_m=10)
    stack = randomise(EvoformerStack(config).double()).eval()
    both = torch.randn(1, 7, 7, 10, dtype=torch.float64)
    plan = make_plan(stack, (both, both), mode="inference", donate=True)
    with torch.no_grad(), pytest.raises(ValueError, match="z cannot be donated: it shares its memory"):
        apply_plan(stack, plan)(both, both)
    assert both.numel()


def test_gradients_and_inputs_already_taken_are_refused() -> None:
    stack, inputs = stack_and_inputs()
    planned = apply_plan(stack, plan_of_stack())
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        planned(**inputs)
    assert all(tensor.numel() for tensor in inputs.values())
    with torch.no_grad():
        planned(**inputs)
        with pytest.raises(ValueError, match="m is empty: a call has taken it; give another tensor"):
            planned(**inputs)


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("more", [1.0, 1.2, 3.0])
def test_peaks_are_as_predicted(costed: Costed, host: bool, more: float) -> None:
    plan = solve(asked(costed, int(more * least(costed, host)), host))
    predicted = plan.predicted.peak_bytes
    assert simulate_plan(plan).measured_peak_bytes == predicted
    found = verify_plan(None, plan, repeats=1)
    assert found.ok
    assert found.max_loss_error is not None
    assert found.max_loss_error < 1e-12
    assert predicted - 64 <= found.measured_peak_bytes <= predicted


def test_the_caller_s_memory_is_freed_while_the_step_runs() -> None:
    """Though the caller still has the tensors."""
    stack, inputs = stack_and_inputs()
    plan = plan_of_stack()
    planned = apply_plan(stack, plan)
    given: dict[str, Tensor] = {}

    def step() -> None:
        given.update(copies(inputs))
        with torch.no_grad():
            planned(**given)

    step()
    peak = measure.peak_bytes(step)
    own = plan.predicted.peak_bytes - plan.static["parameters"]
    assert own - 64 <= peak <= own


def test_the_least_budget_falls_by_what_was_held_twice(costed: Costed) -> None:
    kept = cost_problem(costed.problem.model_copy(update={"donate": False}))
    for host in (False, True):
        assert least(costed, host) < least(kept, host)
        assert solve(asked(costed, least(costed, host), host)).predicted.peak_bytes == least(costed, host)
    size = 8 * sum(map(prod, costed.problem.state_shapes().values()))
    assert kept.static["inputs"] - costed.static["inputs"] == size


@pytest.mark.slow
def test_t1044_in_less_than_five_gibibytes() -> None:
    """48 blocks, s=128, r=2048, float32: the first update of z need not be held beside what was given."""
    for donate, most in ((True, 4.7), (False, 6.7)):
        asked_for = Problem(
            model="alphafold2", config=EvoformerConfig(), shape=InputShape(128, 2048), device="a100-40gb",
            mode="inference", donate=donate, budget_bytes=2**30,
        )  # fmt: skip
        with pytest.raises(NoPlanError) as caught:
            solve(cost_problem(asked_for))
        assert most - 2 < caught.value.least_feasible_bytes / 2**30 <= most
    budget = asked_for.model_copy(update={"donate": True, "budget_bytes": int(4.7 * 2**30)})
    plan = solve(cost_problem(budget))
    assert simulate_plan(plan).measured_peak_bytes == pytest.approx(plan.predicted.peak_bytes, rel=1e-4)


def test_every_byte_of_a_moment_has_an_owner(costed: Costed) -> None:
    table = replace(costed.table, host_bandwidth=1e9)
    plan = solve(asked(costed, least(costed, True), True))
    found = holdings(plan.schedule, table)
    for moment, parts in zip(found.replay.moments, found.parts, strict=True):
        assert sum(parts.values()) == moment.peak_bytes
        assert parts["state"] == moment.held_bytes or moment.phase in ("to host", "from host")
    first = {one.name for one in found.held if one.step == INPUT and one.first == 0}
    assert first == set(costed.problem.config.state)


def test_what_is_given_is_the_chain_s_own() -> None:
    reads = [("m", "z"), ("z",), ("m",)]
    kept, given = Liveness(reads), Liveness(reads, donated=True)
    first, later = Version("m", INPUT), Version("m", 0)
    assert (kept.owns(first), given.owns(first), kept.owns(later)) == (False, True, True)
    assert [kept.owns_target(step) for step in range(3)] == [False, False, True]
    assert [given.owns_target(step) for step in range(3)] == [True, True, True]


def test_all_of_the_state_is_there_when_a_step_begins() -> None:
    """However small what follows is, and whatever may wait on the host then."""
    cost = StepCost(WHOLE, 0, 0, 0, 0, *(Work(),) * 3, 1.0)
    table = CostTable(
        options=((cost,),) * 3, step_reads=(("z",), ("e",), ("m",)), groups=(range(3),),
        state_bytes={"e": 7, "m": 2, "z": 1}, loss_bytes=0, training=False, outputs=("z",),
        host_bandwidth=1.0, donated=True,
    )  # fmt: skip
    assert replay(inference_schedule(table, 10), table).peak_bytes == 10
    with pytest.raises(InfeasibleError) as caught:
        inference_schedule(table, 9)
    assert caught.value.least_bytes == 10
    kept = replace(table, donated=False)
    assert replay(inference_schedule(kept, 7), kept).peak_bytes <= 7


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_take_their_shards(rank: int) -> None:
    costs = cost_problem(problem(ranks=3, device="a100-40gb", dtype="float32"))
    with pytest.raises(NoPlanError) as caught:
        solve(replace(costs, problem=costs.problem.model_copy(update={"budget_bytes": 1})))
    budget = caught.value.least_feasible_bytes
    plan = solve(replace(costs, problem=costs.problem.model_copy(update={"budget_bytes": budget})))
    found = simulate_plan(plan, rank)
    assert found.predicted_peak_bytes == plan.rank_peak_bytes[rank]
    assert found.measured_peak_bytes == pytest.approx(found.predicted_peak_bytes, rel=3e-3)


# --- plans and commands -----------------------------------------------------------------------


def test_plan_files_say_so(tmp_path: Path) -> None:
    plan = plan_of_stack()
    path = tmp_path / "plan.json"
    plan.save(path)
    assert json.loads(path.read_text())["problem"]["donate"] is True
    assert load_plan(path) == plan
    assert load_consistent(str(path)) == plan
    assert shorten_plan(plan, 1).problem.donate
    training = {"mode": "training"}
    plan.model_copy(update={"problem": plan.problem.model_copy(update=training)}).save(path)
    with pytest.raises(PlanFileError, match="inputs are donated in inference only"):
        load_plan(path)


def test_plans_for_other_shapes() -> None:
    stack, inputs = stack_and_inputs()
    plan = plan_of_stack(more=3.0)
    shorter = {"m": inputs["m"][:, :7].clone(), "z": inputs["z"].clone()}
    with torch.no_grad():
        expected = stack(**shorter)
        for way in ("clip", "plan"):
            given = copies(shorter)
            got = apply_plan(stack, plan, other_shapes=way)(**given)
            assert [tensor.numel() for tensor in given.values()] == [0, 0]
            for a, b in zip(expected, got, strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="not padded"):
        apply_plan(stack, plan, other_shapes="pad")
    kept = solve(cost_problem(problem(donate=False)))
    with pytest.raises(ValueError, match="plans of one kind"):
        apply_plan(stack, [plan, kept])


def test_masks_count_and_stay() -> None:
    """One of another dtype is copied; a budget without room for that is refused before anything is taken."""
    stack, inputs = stack_and_inputs()
    plan = plan_of_stack()
    given = copies(inputs) | {"pair_mask": torch.ones(1, 17, 17, dtype=torch.bool)}
    with torch.no_grad(), pytest.raises(ValueError, match="the plan counts"):
        apply_plan(stack, plan)(**given)
    assert torch.equal(given["m"], inputs["m"])
    budget = plan.problem.budget_bytes
    assert budget is not None
    roomier = make_plan(stack, given, 2 * budget, mode="inference", donate=True)
    with torch.no_grad():
        got = apply_plan(stack, roomier)(**given)
        for a, b in zip(stack(**inputs), got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    assert given["pair_mask"].all()


def test_make_plan_refuses_what_cannot_be_taken() -> None:
    stack, inputs = stack_and_inputs()
    turned = {"m": inputs["m"].transpose(1, 2).contiguous().transpose(1, 2), "z": inputs["z"]}
    with pytest.raises(ValueError, match="m cannot be donated: it is laid out otherwise"):
        make_plan(stack, turned, mode="inference", donate=True)
    with pytest.raises(ValueError, match="inputs are donated in inference only"):
        make_plan(stack, inputs, donate=True)


SIZES = ("--model", "alphafold2-narrow", "--n-blocks", "2", "--n-seq", "9", "--n-res", "13")


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "plan.json")
    wanted = (*SIZES, "--mode", "inference", "--memory", "4MiB", "--out", path)
    assert run("plan", *wanted, "--donate") == 0
    assert "float32 inference of donated inputs on cpu" in " ".join(capsys.readouterr().out.split())
    for words in (("verify", path, "--simulate"), ("verify", path, "--repeats", "1"), ("show", path)):
        assert run(*words) == 0
    assert run("run", path, "--steps", "1") == 0
    assert run("verify", path, "--blocks", "1", "--repeats", "1") == 0


def test_training_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert run("plan", *SIZES, "--donate", "--out", str(path)) == 2
    assert capsys.readouterr().err == (
        "evoplan: --donate is for inference: add --mode inference, or leave it out\n"
    )
    assert not path.exists()
    assert run("plan", "--from", "x.py:f", "--donate") == 2
    assert "leave --donate out" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_keeps_within_its_budget() -> None:
    assert local_name("cuda")
    asked_for = problem(device="cuda", dtype="float32")
    with pytest.raises(NoPlanError) as caught:
        solve(cost_problem(asked_for.model_copy(update={"budget_bytes": 1})))
    budget = caught.value.least_feasible_bytes
    plan = solve(cost_problem(asked_for.model_copy(update={"budget_bytes": budget})))
    assert verify_plan(None, plan, repeats=1).ok
