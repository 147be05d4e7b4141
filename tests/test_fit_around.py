"""What lies around the blocks: a norm that closes the stack, and a loss that takes more than they do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evoplan.planner.fitting.by_hand import AGAIN, each_block_again
from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Checkpoint, Run
from evoplan.planner.solvers import Frontier
from tests.test_fit import assert_same, chain_of, step
from tests.zoo import Block, Case, case, random

Change = Callable[[nn.Module], object]


class Heavy(nn.Module):
    """Blocks, a norm, and a head that makes far more than they do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 700)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).log_softmax(-1)


def heavy() -> Case:
    return Case(Heavy().train(), (random(3, 37, 16).requires_grad_(),))


def test_a_norm_that_closes_a_stack_is_planned_with_it() -> None:
    names = [call.name for call in chain_of(case("gpt")).calls]
    assert names == [*(f"blocks.{at}" for at in range(5)), "norm"]


class Twice(nn.Sequential):
    """Calls a norm for the second time."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


def _called_twice(model: nn.Module) -> None:
    model.words = Twice(model.words, model.norm)


def _hooked(model: nn.Module) -> None:
    model.norm.register_forward_hook(lambda module, args, out: None)


def _changed_before(model: nn.Module) -> None:
    model.blocks[4].register_forward_hook(lambda module, args, out: out * 2)


def _frozen(model: nn.Module) -> None:
    model.norm.requires_grad_(False)


def _counting(model: nn.Module) -> None:
    model.norm = nn.BatchNorm1d(13).double()  # of batch, place, channel


@pytest.mark.parametrize("change", [_called_twice, _hooked, _changed_before, _frozen, _counting])
def test_what_is_more_than_that_stays_the_models_own(change: Change) -> None:
    given = case("gpt")
    change(given.model)
    names = [call.name for call in chain_of(given).calls]
    assert names == [f"blocks.{at}" for at in range(5)]
    expected = step(given, copy.deepcopy(given.model))
    fitted = given.fit()
    fitted.replan(fitted.plan.least_feasible_bytes)
    assert_same(expected, step(given))
    fitted.remove()


def test_where_the_loss_takes_most_little_is_held_there() -> None:
    """A solver that is not told of it keeps a state for each block, as that costs it nothing."""
    given = heavy()
    expected = step(given, copy.deepcopy(given.model))
    fitted = given.fit()
    fitting: Fitting = fitted._fitting
    table = fitting.table
    fitted.replan(fitted.plan.least_feasible_bytes)
    (whole,) = fitted.plan.schedule.parts
    assert isinstance(whole, Checkpoint)
    assert replay(fitted.plan.schedule, table).peak.phase == "loss"
    # The simulation of the whole step, to the byte, but for the numbers that a loss is.
    static = fitted.plan.predicted.static_bytes
    state = table.state_bytes[fitting.captured.outputs[0]]
    found = fitted.verify(given.args)
    assert found.ok
    assert found.measured_peak_bytes <= found.predicted_peak_bytes
    assert found.predicted_peak_bytes - static < 5 * 3 * 37 * 700 * 8 + 3 * state
    assert_same(expected, step(given))


class Outside(nn.Sequential):
    """A head that the model calls by a function of its own: a copy of the model has the same one."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(*(Block(16) for _ in range(4)))
        self.out: Callable[[Tensor], Tensor] = lambda x: torch.tanh(head(x))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))


@pytest.mark.parametrize("within", [False, True], ids=["loss", "function"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_a_loss_or_a_function_has_of_its_own_is_left_alone(within: bool, share: float) -> None:
    """Its gradients are neither fakes after fitting nor sums of two steps after verifying."""
    torch.manual_seed(0)
    head = nn.Linear(16, 5).double()
    model = Outside(head) if within else nn.Sequential(*(Block(16) for _ in range(4))).double()
    loss = lambda out: (out if within else torch.tanh(head(out))).square().mean()  # noqa: E731
    given = Case(model, (random(3, 37, 16).requires_grad_(),), loss=loss)

    def trained() -> dict[str, Tensor]:
        return step(given) | {
            name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None
        }

    expected = trained()
    before = head.weight.grad
    assert before is not None
    seen: list[Tensor] = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight))
    head.bias.grad = None
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    fitted.replan(int(least + share * (most - least)))
    assert not seen
    found = fitted.verify(given.args)
    assert found.ok
    assert found.measured_peak_bytes <= found.predicted_peak_bytes
    assert head.weight.grad is before
    assert head.bias.grad is None
    assert torch.equal(before, expected["weight"])
    head.zero_grad()
    assert_same(expected, trained())


def test_the_least_is_no_more_than_without_knowing_of_the_loss() -> None:
    for given in (heavy(), case("gpt"), case("pairs"), case("sequential")):
        fitted = given.fit()
        fitting: Fitting = fitted._fitting
        outputs = sum(fitting.table.state_bytes[name] for name in fitting.captured.outputs)
        assert fitting.table.loss_bytes >= outputs
        untold = type(fitting.table)(**{**vars_of(fitting.table), "loss_bytes": outputs})
        least = fitting.predict(Frontier(untold).least).peak_bytes
        assert fitted.plan.least_feasible_bytes <= least
        fitted.remove()


def vars_of(table: object) -> dict[str, object]:
    return {name: getattr(table, name) for name in table.__dataclass_fields__}  # type: ignore[attr-defined]


def test_the_baseline_is_what_a_checkpoint_by_hand_does() -> None:
    fitted = case("gpt").fit()
    schedule = each_block_again(fitted._fitting.table)
    assert all(isinstance(part, Run) and part.strategy == AGAIN for part in schedule.parts)
    assert fitted.plan.baselines["large"] == fitted._fitting.predict(schedule)
    fitted.remove()
    cnn = case("cnn").fit()  # blocks that write into buffers are not left to autograd
    parts = each_block_again(cnn._fitting.table).parts
    assert any(isinstance(part, Checkpoint) for part in parts)
