"""What blocks return besides new tensors, and what they read besides what they are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evoplan
from evoplan.model.foreign.capture import CaptureError
from evoplan.model.foreign.leaves import ChangedCallError
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, actions

WIDTH = 8


class Reversed(torch.autograd.Function):
    """A view whose gradient is turned round (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Block(nn.Module):
    def __init__(self, returns: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.returns = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), returns

    def forward(self, x: Tensor) -> Any:
        return self.returns(x, x + self.down(torch.tanh(self.up(x))))


class Stack(nn.Module):
    """Both results of every block are used."""

    def __init__(
        self, returns: Callable[[Tensor, Tensor], Any], block: Callable[..., nn.Module] = Block
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(returns) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for block in self.blocks:
            first, second = block(x)
            x, total = first + 0.1 * second, total + (first * second).cos()
        return total * x


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "detached": lambda x, y: (y, y.detach()),
    "detached first": lambda x, y: (y.detach(), y),
    "argument detached": lambda x, y: (y, x.detach()),
    "reversed": lambda x, y: (y, Reversed.apply(y)),
    "argument reversed": lambda x, y: (y, Reversed.apply(x)),
    "twice": lambda x, y: (y, y),
    "argument": lambda x, y: (y, x),
    "view": lambda x, y: (y, y.view(y.shape)),
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out, *(p.grad for p in (x, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("name", RESULTS)
def test_results_with_gradients_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(RESULTS[name]).double(), torch.randn(37, WIDTH, dtype=torch.float64)
    expected = gradients(deepcopy(model), x)
    fitted = evoplan.fit(model, (x.clone().requires_grad_(),))
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2, None):
        fitted.replan(budget)
        torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_results_that_have_changed_are_refused(share: float) -> None:
    """A flag that is turned after the plan was made; in autograd's own graph and out of it."""
    late: list[Callable[[Tensor, Tensor], Any]] = []

    def returns(x: Tensor, y: Tensor) -> Any:
        return late[0](x, y) if late else (y, x)

    model, x = Stack(returns).double(), torch.randn(37, WIDTH, dtype=torch.float64)
    fitted = evoplan.fit(model, (x,))
    if not share:
        fitted.replan(fitted.plan.least_feasible_bytes)
    gradients(model, x)
    late.append(lambda x, y: (y, 2 * x))
    with pytest.raises(ChangedCallError, match="in place of one that it passed on"):
        gradients(model, x)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_detached_wants_no_gradient(again: bool) -> None:
    """As without a plan; and where it wants one later, of what forward has not recorded, that is said."""
    late: list[Callable[[Tensor], Tensor]] = [Tensor.detach]
    seen: list[bool] = []

    def returns(x: Tensor, y: Tensor) -> Any:
        return y, late[-1](y)

    class Watching(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, aside = block(x)
                seen.append(aside.requires_grad)
                x = x + aside.cos()
            return x

    model, x = Watching(returns).double(), torch.randn(37, WIDTH, dtype=torch.float64)
    fitted = evoplan.fit(model, (x,))
    if again:
        whole = Checkpoint(Sequence(tuple(Run(at, WHOLE) for at in range(4))), (WHOLE,) * 4)
        fitted._patched.todo = tuple(actions(Sequence((whole,))))
    seen.clear()
    model(x)
    assert seen == [False] * 4
    late.append(torch.sin)
    if again:
        with pytest.raises(RuntimeError, match="of what it had detached"):
            gradients(model, x)


SHARED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[..., Tensor]]] = {
    "split": (lambda x, y: y.split(3, -1), lambda *parts: torch.cat(parts, -1)),
    "unbound": (lambda x, y: y.unbind(0), lambda *rows: torch.stack(rows)),
    "view of an argument": (lambda x, y: (y, x[:, :3]), lambda y, part: y + part.mean()),
    "transposed": (lambda x, y: y.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "argument detached": (lambda x, y: (y, x.detach()), lambda y, aside: y + aside.cos()),
    "detached": (lambda x, y: (y, y.detach()), lambda y, aside: y + aside.cos()),
}


@pytest.mark.parametrize("name", SHARED)
def test_memory_of_results_that_share_it(name: str) -> None:
    """Of views and what is detached: once, and gradients as large as they are."""
    returns, joined = SHARED[name]

    class Joining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(returns) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                found = block(x)
                x = joined(*found) if isinstance(found, tuple) else joined(found)
            return x

    model, x = Joining(), torch.randn(17, 129, WIDTH)
    fitted = evoplan.fit(model, (x,), optimizer="none")
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2, most):
        fitted.replan(budget)
        found = fitted.verify((x,))
        assert found.ok
        assert 0.99 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0005


def test_memory_of_arguments_in_another_layout() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(lambda x, y: y) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x.transpose(0, 1)).transpose(0, 1)
            return x

    x = torch.randn(17, 129, WIDTH)
    fitted = evoplan.fit(Turned(), (x,), optimizer="none")
    assert fitted._fitting.captured.calls[1].arguments[0].layout.stride == (WIDTH, 129 * WIDTH, 1)
    fitted.replan(fitted.plan.least_feasible_bytes)
    found = fitted.verify((x,))
    assert 0.98 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0005


def test_memory_of_arguments_that_are_parts() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Bilinear(WIDTH, WIDTH, 2 * WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.tanh(block(*x.chunk(2, -1)))
            return x

    x = torch.randn(17, 129, 2 * WIDTH)
    fitted = evoplan.fit(Parts(), (x,), optimizer="none")
    found = fitted.verify((x,))
    assert 0.98 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0005


class Collected(nn.Module):
    """What a module in each block makes is collected by hooks, while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(lambda x, y: y) for _ in range(3))
        self.seen: list[Tensor] = []
        self.collecting = self.keeping = False
        for block in self.blocks:
            block.up.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.collecting:
            self.seen.append(out if self.keeping else out.detach())

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        self.collecting = True
        try:
            for block in self.blocks:
                x = block(x)
        finally:
            self.collecting = False
        return x.square().mean() + sum(out.square().mean() for out in self.seen)


def test_what_hooks_keep_and_a_loss_reads_is_refused() -> None:
    """It would be cut off from the graph; what is detached is nobody's loss."""
    model, x = Collected(), torch.randn(37, WIDTH)
    model.keeping = True
    with pytest.raises(CaptureError, match="that a gradient is wanted of afterwards"):
        evoplan.fit(model, (x,), loss=lambda value: value)
    model.keeping = False
    evoplan.fit(model, (x,), loss=lambda value: value).remove()


class Reads(nn.Module):
    """Weights that are no parameters of its own."""

    def __init__(self, weights: list[nn.Module]) -> None:
        super().__init__()
        self.own, self.weights = nn.Linear(WIDTH, WIDTH), weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + torch.tanh(self.weights[0](self.own(x)))
        return y, y


def test_what_is_read_and_wants_a_gradient_is_given() -> None:
    weights = [nn.Linear(WIDTH, WIDTH)]
    model, x = Stack(weights, block=Reads), torch.randn(37, WIDTH)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="neither given to it nor a parameter of its own"):
        evoplan.fit(model, (x,))
    weights[0].requires_grad_(False)
    evoplan.fit(model, (x,)).remove()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda out: out.square().mean(0), "the loss is float64"),
        (lambda out: 3.0, "of class float"),
        (lambda out: None, "of class NoneType"),
        (lambda out: out.detach().mean(), "wants no gradient"),
        (lambda out: out.sum() * 1j, "the loss is complex128"),
    ],
)
def test_a_loss_is_one_real_number(loss: Callable[[Tensor], Tensor], says: str) -> None:
    model, x = Stack(RESULTS["argument"]).double(), torch.randn(37, WIDTH, dtype=torch.float64)
    with pytest.raises(CaptureError, match=says):
        evoplan.fit(model, (x,), loss=loss)
    model.requires_grad_(False)
    with pytest.raises(CaptureError):
        evoplan.fit(model, (x,))


class Fills(nn.Module):
    """Given a number that is none, and keeps another one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.fill = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), float("nan")

    def forward(self, x: Tensor, fill: float) -> Tensor:
        self.fill = float("nan")
        return x + self.down(torch.tanh(self.up(x)).masked_fill(x[:, :1] > 1e9, fill))


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.fill = nn.ModuleList(Fills() for _ in range(3)), "nan"

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, float(self.fill))
        return x


def test_a_number_that_is_none_is_the_same_as_another() -> None:
    torch.manual_seed(0)
    model = Filled().double()
    x = torch.randn(50, WIDTH, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that slices were planned for another call
        fitted = evoplan.fit(model, (x,))
        fitted.replan(fitted.plan.least_feasible_bytes)
        fitted(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    model.fill = "0"
    with pytest.raises(ChangedCallError, match=r"blocks\.0 is given 0\.0 in place of nan"):
        model(x)


class Asks(nn.Module):
    """Whether what it is given is one tensor or two, as `nn.MultiheadAttention` does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, again: Tensor) -> Tensor:
        y = self.one(x) if memory is x else self.other(memory)
        return x + torch.tanh(y) * (2.0 if again is memory else again)


@pytest.mark.parametrize("again", [False, True])
def test_arguments_that_are_one_object_stay_one(again: bool) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Asks() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            first, second = x, x.view_as(x)
            for at, block in enumerate(self.blocks):
                given = ((x, x, x), (x, x.view_as(x), x), (x, first, second))[at % 3]
                x = block(*given)
            return x

    torch.manual_seed(0)
    model, x = Asking().double(), torch.randn(37, WIDTH, dtype=torch.float64)
    expected = gradients(deepcopy(model), x)
    fitted = evoplan.fit(model, (x.clone().requires_grad_(),))
    if again:
        whole = Checkpoint(Sequence(tuple(Run(at, WHOLE) for at in range(6))), (WHOLE,) * 6)
        fitted._patched.todo = tuple(actions(Sequence((whole,))))
    else:
        fitted.replan(fitted.plan.least_feasible_bytes)
    torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=1e-10)
    fitted.remove()
    fitted = evoplan.fit(model, (x,), optimizer="none")
    for budget in (fitted.plan.least_feasible_bytes, None):
        fitted.replan(budget)
        found = fitted.verify((x,))
        assert 0.97 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0
