"""Modules that draw random numbers, run in slices: the numbers are those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evoplan
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.noise import OtherDrawsError, SlicedDraws
from evoplan.model.foreign.slices import InSlices
from tests.test_fit_axes import Of, child_of, gradients, in_slices
from tests.zoo import random


class Attention(nn.Module):
    """With dropout in it and after it, heads behind the batch, and keys whose bias changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.output, self.dropout = nn.Linear(12, 36), nn.Linear(12, 12), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        return x + self.dropout(self.output(heads.transpose(1, 2).flatten(2)))


def mixed_rows(x: Tensor) -> Tensor:
    """Its first dimension is behind another in what is drawn at once."""
    return F.dropout(x.expand(3, *x.shape).reshape(-1, x.shape[-1]), 0.5).view(3, *x.shape).sum(0)


def rate_of_rows(x: Tensor) -> Tensor:
    """As paths are dropped: a number for each row, by a sum that is rounded."""
    return x * (torch.rand(x.shape[0], 1, dtype=x.dtype) + 0.6).floor_()


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[int]]] = {
    "dropout": (lambda: Of(lambda x, w: F.dropout(x @ w, 0.4), 8, 8), (13, 8), {0}),
    "its elements": (lambda: Of(lambda x: F.dropout(x.sin(), 0.4)), (13, 8), {0, 1}),
    "its own kernel": (lambda: Of(lambda x: torch.native_dropout(x.sin(), 0.4, True)[0]), (13, 8), {0, 1}),
    "columns that lie first": (lambda: Of(lambda x: F.dropout(x.mT.sin(), 0.4)), (13, 8), {0, 1}),
    "one for all rows": (
        lambda: Of(lambda x: x.sin() * torch.empty(1, x.shape[1]).bernoulli_(0.5)), (13, 8), {0, 1}
    ),
    "paths": (lambda: Of(rate_of_rows), (13, 8), {0, 1}),
    "noise": (lambda: Of(lambda x: x.sin() + torch.randn_like(x) + torch.rand_like(x)), (13, 8), {0, 1}),
    "filled": (lambda: Of(lambda x: x * torch.empty_like(x).uniform_(1, 2).add_(1)), (13, 8), {0, 1}),
    "flattened": (lambda: Of(lambda x: F.dropout(x.flatten(0, 1), 0.5).view_as(x)), (13, 5, 8), {0, 2}),
    "behind another": (lambda: Of(mixed_rows), (13, 8), {1}),
    "attention": (Attention, (13, 7, 12), {0}),
    "a permutation": (lambda: Of(lambda x: x + torch.randperm(x.shape[1])), (13, 8), set()),
    "a generator of its own": (
        lambda: Of(lambda x: x + torch.rand(x.shape, generator=torch.Generator().manual_seed(1))),
        (13, 8),
        set(),
    ),
}  # fmt: skip


def seeded(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Results and gradients, and where the generator stands then."""
    torch.manual_seed(3)
    return gradients(module, forward, x), torch.get_rng_state()


@pytest.mark.parametrize("name", MODULES)
def test_axes_of_what_draws(name: str) -> None:
    make, shape, dims = MODULES[name]
    module = make().double()
    child = child_of(module, random(*shape))
    if None in child.draws:
        assert not dims  # nobody asks for its axes: see `Child.plain`
    else:
        assert {axis.dim for axis in child.axes} == dims


@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("name", [name for name, (_, _, dims) in MODULES.items() if dims])
def test_slices_draw_what_the_whole_draws(name: str, n: int) -> None:
    make, shape, dims = MODULES[name]
    module, x = make().double(), random(*shape)
    child = child_of(module, x)
    expected, state = seeded(module, module.forward, x)
    for dim in dims:
        got, state_after = seeded(module, in_slices(module, child, dim, n), x)
        assert torch.equal(state, state_after)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    """What is drawn as booleans is what the whole draws in a dtype of its own."""
    module, x = Of(lambda x: F.dropout(x, 0.3)), torch.ones(13, 8, dtype=dtype)
    child = child_of(module, x)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert torch.equal(in_slices(module, child, 0, 4)(x), expected)


def test_what_a_kernel_draws_by_itself_is_run_as_a_whole() -> None:
    """On some devices attention draws within itself: as planned on another, it does not run in slices."""
    module, x = Attention().double(), random(13, 7, 12)
    child = child_of(module, x)
    forward = InSlices(module, module.forward, child, child.axis(0), 3, Settings(module), module.forward)
    expected, _ = seeded(module, module.forward, x)
    random_kernel = torch.ops.aten.native_dropout.default

    def by_another_kernel(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        return random_kernel(x, p, training)[0]  # type: ignore[no-any-return]

    module.dropout.forward = lambda x: by_another_kernel(x, 0.2)  # type: ignore[method-assign]
    child = child_of(module, x)
    del module.dropout.forward
    forward.child = child
    with pytest.warns(UserWarning, match="other random numbers"):
        got, _ = seeded(module, forward, x)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


def test_slices_that_draw_unlike_one_another_are_an_error() -> None:
    module, x = Of(lambda x: F.dropout(x, 0.3)), random(13, 8)
    draws = SlicedDraws(child_of(module, x).draws, 13)
    with draws.of(slice(0, 5)):
        module(x[:5])
    with pytest.raises(OtherDrawsError, match="fewer"), draws.of(slice(5, 13)):
        pass
    with pytest.raises(OtherDrawsError, match="no slice"), draws.of(slice(5, 13)):
        module(x[5:12])
    with pytest.raises(OtherDrawsError, match="other random numbers"), draws.of(slice(5, 13)):
        module(module(x[5:]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.1))
        self.output = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.output(self.mlp(x))


def test_a_fitted_model_with_dropout_in_slices_is_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).double()
    x = random(6, 64, 12)
    fitted = evoplan.fit(model, (x,))
    whole, least = fitted.frontier()[-1], fitted.frontier()[0]
    assert least.activation_bytes < whole.activation_bytes / 2
    fitted.replan(least.peak_bytes)
    assert "attention=chunk(0, " in fitted.report()
    verified = fitted.verify((x,))
    assert verified.ok
    assert verified.max_gradient_error < 1e-10
    assert 0.97 <= verified.measured_peak_bytes / verified.predicted_peak_bytes <= 1.0
