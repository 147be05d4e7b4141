"""`evoplan.fit` on models written elsewhere: their own gradients, and no more memory than promised."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evoplan
from evoplan.cost_model.calls import calls_table
from evoplan.cost_model.children import with_children
from evoplan.cost_model.devices import device
from evoplan.cost_model.menus import strategies_of
from evoplan.model.foreign.capture import Captured
from evoplan.model.foreign.lean import remaking_operators
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.fitting.simulating import Given, captured, mean_of_squares
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, shape_of
from tests.zoo import CASES, Case, case, random


def chain_of(case: Case) -> Captured:
    cpu = device("cpu")
    return with_children(
        case.model, captured(case.model, Given.of(case.args, case.kwargs), cpu), cpu, "float64"
    )


def step(case: Case, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Loss, all gradients and buffers of a training step."""
    model = case.model if model is None else model
    leaves = [arg for arg in case.args if isinstance(arg, Tensor) and arg.requires_grad]
    for tensor in (*model.parameters(), *leaves):
        tensor.grad = None
    torch.manual_seed(3)
    loss = (case.loss or mean_of_squares)(model(*case.args, **case.kwargs))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"input {at}": leaf.grad.clone() for at, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found | {"loss": loss.detach()}


def assert_same(expected: dict[str, Tensor], got: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert expected.keys() == got.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert float((tensor - got[name]).abs().max()) <= tolerance * largest, name


def check_at_five_budgets(given: Case, fitted: evoplan.Fitted, tolerance: float) -> list[Sequence]:
    """From the least to what the fastest plan of all takes: within each, 0.98 to 1 of what is predicted.

    Args:
        tolerance: of gradients.

    Returns:
        The schedules.
    """
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    assert least < most
    schedules = []
    for part in range(5):
        budget = least + (most - least) * part // 4
        fitted.replan(budget)
        found = fitted.verify(given.args, given.kwargs)
        assert found.ok, found
        assert found.measured_peak_bytes <= found.predicted_peak_bytes <= budget
        assert found.measured_peak_bytes >= 0.98 * found.predicted_peak_bytes
        assert found.max_gradient_error <= tolerance
        schedules.append(fitted.plan.schedule)
    return schedules


def random_schedule(rng: Random, offered: list[list[Any]], span: range, depth: int = 0) -> Sequence:
    """Any nesting of checkpoints up to three deep, any strategy of each step."""
    parts: list[Run | Checkpoint] = []
    at = span.start
    while at < span.stop:
        if depth == 3 or rng.random() < 0.5:
            parts.append(Run(at, rng.choice(offered[at])))
            at += 1
        else:
            stop = rng.randint(at + 1, span.stop)
            body = random_schedule(rng, offered, range(at, stop), depth + 1)
            parts.append(Checkpoint(body, tuple(rng.choice(offered[step]) for step in range(at, stop))))
            at = stop
    return Sequence(tuple(parts))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_models_own_under_any_schedule(name: str) -> None:
    """The same operators on the same numbers, or on slices. Random states and buffers are theirs, too."""
    given, rng = case(name), Random(name)
    chain = chain_of(given)
    offered = [strategies_of(call.children) for call in chain.calls]
    expected = step(given, copy.deepcopy(given.model))
    for _ in range(8):
        model = copy.deepcopy(given.model)
        schedule = random_schedule(rng, offered, range(len(chain.calls)))
        Patched(model, chain, schedule).install()
        got = step(given, model)
        assert_same(expected, got)
        assert shape_of(schedule)


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_of_every_block(name: str) -> None:
    given = case(name)
    chain = chain_of(given)
    expected = step(given, copy.deepcopy(given.model))
    offered = [strategies_of(call.children) for call in chain.calls]
    for number in range(max(map(len, offered))):
        model = copy.deepcopy(given.model)
        runs = (Run(at, some[min(number, len(some) - 1)]) for at, some in enumerate(offered))
        Patched(model, chain, Sequence(tuple(runs))).install()
        assert_same(expected, step(given, model))


@pytest.mark.parametrize("name", CASES)
def test_the_measured_peak_is_the_predicted_one(name: str) -> None:
    """From the least budget to the largest: within it, and not much below what was predicted."""
    given = case(name)
    fitted = given.fit()
    check_at_five_budgets(given, fitted, 1e-12)  # sums in another order, at most


@pytest.mark.parametrize("name", CASES)
def test_the_measured_peak_of_every_strategy_is_the_predicted_one(name: str) -> None:
    """Of those that no budget chooses, too: every block under each that it offers."""
    given = case(name)
    under = given.fit()
    fitting, plan = under._fitting, under.plan
    under.remove()
    options = fitting.table.options
    for number in range(max(map(len, options))):
        runs = tuple(Run(at, some[min(number, len(some) - 1)].strategy) for at, some in enumerate(options))
        schedule = Sequence(runs)
        about = {"schedule": schedule, "predicted": fitting.predict(schedule)}
        fitted = given.fit(plan=plan.model_copy(update=about))
        found = fitted.verify(given.args, given.kwargs)
        fitted.remove()
        assert found.ok, (runs[1], found)
        assert found.measured_peak_bytes <= found.predicted_peak_bytes
        assert found.measured_peak_bytes >= 0.97 * found.predicted_peak_bytes, runs[1]


@pytest.mark.parametrize(("name", "keeps"), [("cnn", (0,)), ("pairs", (1,)), ("gpt", ())])
def test_what_a_block_keeps_of_what_it_makes_counts_once(name: str, keeps: tuple[int, ...]) -> None:
    """The result of a relu; the pair representation that the single one is made from."""
    given = case(name)
    table = calls_table(given.model, chain_of(given), device("cpu"), "float64")
    for options in table.options:
        assert options[0].strategy == WHOLE
        assert options[0].keeps_made == keeps
        assert options[0].preserved_bytes > 0


def test_what_is_made_again_is_made_of_what_was_there() -> None:
    """Operators that write into what others were made of; also for a second backward."""

    def made(x: Tensor, weight: Tensor) -> Tensor:
        a = x @ weight
        y = torch.sigmoid(a)
        z = (y * 3) @ weight
        a.add_(1.0)
        v = torch.tanh(a) * y
        a.mul_(2)
        return (z * v * torch.relu(a + v)).sum()

    x, weight = random(5, 5).requires_grad_(), random(5, 5, seed=1).requires_grad_()
    expected = torch.autograd.grad(made(x, weight), (x, weight))
    with remaking_operators():
        total = made(x, weight)
    for keep in (True, False):
        got = torch.autograd.grad(total, (x, weight), retain_graph=keep)
        assert all(a.equal(b) for a, b in zip(expected, got, strict=True))


def test_one_byte_below_the_least_is_refused_and_says_so() -> None:
    given = case("gpt")
    fitted = given.fit()
    least = fitted.plan.least_feasible_bytes
    fitted.remove()
    given.fit(least).remove()
    with pytest.raises(evoplan.NoPlanError, match=r"the least that does is .*blocks\.\d") as error:
        given.fit(least - 1)
    assert error.value.least_feasible_bytes == least
    assert "forward" not in given.model.__dict__  # nothing half done


def test_more_budget_is_never_slower() -> None:
    given = case("pairs")
    fitted = given.fit()
    frontier = fitted.frontier(8)
    assert [p.peak_bytes for p in frontier] == sorted(p.peak_bytes for p in frontier)
    assert [p.step_seconds for p in frontier] == sorted((p.step_seconds for p in frontier), reverse=True)
    assert frontier[0].peak_bytes == fitted.plan.least_feasible_bytes
    assert frontier[-1].step_seconds == fitted.plan.predicted.step_seconds
    assert fitted.plan.predicted.peak_bytes <= fitted.plan.baselines["none"].peak_bytes


def test_a_plan_is_saved_read_and_refused_by_another_model(tmp_path: Any) -> None:
    given, path = case("gpt"), tmp_path / "plan.json"
    fitted = given.fit(10**7)
    fitted.plan.save(path)
    fitted.remove()
    again = given.fit(plan=path)
    assert again.plan == fitted.plan
    assert "blocks.0" in again.report()
    again.remove()
    with pytest.raises(evoplan.CaptureError, match="called otherwise"):
        evoplan.fit(case("sequential").model, case("sequential").args, plan=path)
    path.write_text(path.read_text().replace('"adamw"', '"sgd"'))
    with pytest.raises(ValueError, match="altered since it was made"):
        given.fit(plan=path)


@pytest.mark.parametrize(
    ("model", "args", "says"),
    [
        (nn.Linear(3, 3), (torch.ones(2, 3),), "no modules that are called one after the other"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.ones(2, 3),), "no parameters"),
    ],
)
def test_what_cannot_be_planned_is_told(model: nn.Module, args: tuple[Tensor, ...], says: str) -> None:
    with pytest.raises(evoplan.CaptureError, match=says):
        evoplan.fit(model, args)
