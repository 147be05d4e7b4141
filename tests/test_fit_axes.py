"""Axes that modules are shown to be independent along, and modules run in slices of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.cost_model.children import with_children
from evoplan.cost_model.devices import device
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.children import SELF, Child, layouts_of
from evoplan.model.foreign.independence import independent_axes
from evoplan.model.foreign.noise import WholeDraws
from evoplan.model.foreign.slices import InSlices
from evoplan.planner.fitting.simulating import Given, captured
from tests.zoo import random

Dims = set[int]


def child_of(module: nn.Module, *args: Any, plain: bool = True, **kwargs: Any) -> Child:
    """What a call of a module is."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    with WholeDraws() as draws:
        returned, structure_returned = pytree.tree_flatten(module(*args, **kwargs))
    return Child(
        path=SELF, parent="", calls=1, work=str(id(module)),
        structure=structure, arguments=layouts_of(leaves),
        wanted=tuple(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves),
        read=tuple(isinstance(leaf, Tensor) for leaf in leaves),
        returned=structure_returned, results=layouts_of(returned), plain=plain, stays=True,
        draws=tuple(draws.found), changes=False, kept_bytes=0, peak_bytes=0, seconds=0.0,
        prove=partial(independent_axes, module),
    )  # fmt: skip


def children_of(block: nn.Module, *args: Tensor) -> dict[str, Child]:
    """What a block calls, as the second of two."""
    model = nn.Sequential(block, block)
    cpu = device("cpu")
    chain = captured(model, Given.of(args, {}), cpu)
    return dict(with_children(model, chain, cpu, "float32").calls[1].children)


class Of(nn.Module):
    """A function of its arguments and, if it has one, a weight."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(random(*shape)) if shape else None

    def forward(self, *args: Any) -> Any:
        return self.function(*args) if self.weight is None else self.function(*args, self.weight)


def attention(x: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (x @ weight).chunk(3, -1)
    logits = (q @ k.transpose(-1, -2)).masked_fill(hidden[:, None, :], -1e4)
    return logits.softmax(-1) @ v


BATCH = random(6, 30, 8)
HIDDEN = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4

# A module, what it is called with, and the dimensions of its first result that are independent.
MODULES: dict[str, tuple[nn.Module, tuple[Any, ...], Dims]] = {
    "linear": (nn.Linear(8, 5), (BATCH,), {0, 1}),
    "linear of zeros": (nn.Linear(8, 5), (BATCH,), {0, 1}),
    "pointwise": (nn.GELU(), (BATCH,), {0, 1, 2}),
    "attention": (Of(attention, 8, 24), (BATCH, HIDDEN), {0}),
    "attention of zeros": (Of(attention, 8, 24), (BATCH, HIDDEN), {0}),
    "softmax over rows": (Of(lambda x, w: (x @ w).softmax(1), 8, 8), (BATCH,), {0}),
    "outer sum": (Of(lambda x, y: x[:, :, None] + y[:, None]), (random(9, 4), random(9, 4)), {0, 1, 2}),
    "outer product of one": (Of(lambda x: torch.einsum("ic,jc->ij", x, x)), (random(9, 4),), set()),
    "transposed": (Of(lambda x, w: (x @ w).transpose(0, 1), 8, 8), (BATCH,), {0, 1}),
    "mean over batch": (Of(lambda x, w: x @ w - (x @ w).mean(0), 8, 8), (BATCH,), {1}),
    "above the mean": (Of(lambda x, w: (x @ w) * (x > x.mean(1, True)), 8, 8), (BATCH,), {0}),
    "ranks": (Of(lambda x, w: (x @ w) * x.argsort(1).argsort(1), 8, 8), (BATCH,), {0}),
    "positions": (Of(lambda x, w: (x @ w) * torch.arange(x.shape[1])[:, None], 8, 8), (BATCH,), {0}),
    "positions of small numbers": (
        Of(lambda x, w: x @ w + torch.arange(x.shape[1])[:, None] * (-x.pow(2).sum(-1, True)).exp(), 8, 8),
        (BATCH,), {0},
    ),
    "far roll": (Of(lambda x, w: x @ w + x.roll(23, 1), 8, 8), (random(6, 64, 8),), {0}),
    "every 25th": (Of(lambda x, w: x @ w + x[:, ::25].sum(1, True), 8, 8), (random(6, 64, 8),), {0}),
    "dilated": (nn.Conv1d(8, 8, 3, padding=20, dilation=20), (random(6, 8, 64),), {0}),
    "cumulative": (Of(lambda x, w: (x @ w).cumsum(1), 8, 8), (BATCH,), {0}),
    "flipped": (Of(lambda x, w: (x @ w).flip(1), 8, 8), (BATCH,), {0}),
    "batch normalisation": (nn.BatchNorm1d(30), (BATCH,), set()),
    "group normalisation": (nn.GroupNorm(2, 30), (BATCH,), {0}),
    "square": (Of(lambda x, w: (x @ w) @ x, 8, 30), (BATCH,), {0}),
    "in single precision": (Of(lambda x, w: (x.float() @ w.float()).to(x.dtype), 8, 8), (BATCH,), {0, 1}),
    "two results": (Of(lambda x, w: (x @ w, x.sum(-1)), 8, 8), (BATCH,), {0, 1}),
    "two results, one mixed": (Of(lambda x, w: (x @ w, x.sum(1)), 8, 8), (BATCH,), {0}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_axes_are_found_and_no_false_ones(name: str) -> None:
    module, args, expected = MODULES[name]
    module.double()
    if name.endswith("of zeros"):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    child = child_of(module, *args)
    found = {axis.dim for axis in child.axes if axis.length > 1}
    assert found == expected
    shape = child.results[0].shape
    assert all(axis.length == shape[axis.dim] for axis in child.axes)


def test_the_axes_of_openfolds_nine_submodules() -> None:
    """None of the triangle updates as wholes: their biases, or other edges, come of all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openfold3.core.model.latent.evoformer import EvoformerBlock
    block = EvoformerBlock(
        c_m=8, c_z=16, c_hidden_msa_att=4, c_hidden_opm=4, c_hidden_mul=8, c_hidden_pair_att=4,
        no_heads_msa=2, no_heads_pair=2, transition_type="relu", transition_n=2,
        msa_dropout=0.0, pair_dropout=0.0,
        no_column_attention=False, opm_first=False, fuse_projection_weights=False, inf=1e9, eps=1e-3,
    )  # fmt: skip

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            m, z, *masks = state
            return (*self.block(m, z, *masks), *masks)

    model, cpu = nn.Sequential(Pair(), Pair()), device("cpu")
    state = random(1, 6, 9, 8), random(1, 9, 9, 16), torch.ones(1, 6, 9), torch.ones(1, 9, 9)
    given = Given.of((tuple(t.float() for t in state),), {})
    children = with_children(model, captured(model, given, cpu), cpu, "float32").calls[1].children
    found = {path.removeprefix("block."): {a.dim for a in child.axes} for path, child in children.items()}
    expected: dict[str, Dims] = {
        "msa_att_row": {1}, "msa_att_col": {2}, "msa_transition": {1, 2}, "outer_product_mean": set(),
        "pair_stack.tri_mul_out": set(), "pair_stack.tri_mul_in": set(), "pair_stack.tri_att_start": set(),
        "pair_stack.tri_att_end": set(), "pair_stack.pair_transition": {1, 2},
        "pair_stack.tri_att_start.mha": {1, 2}, "pair_stack.tri_att_end.mha": {1, 2},
    }  # fmt: skip
    assert {path: found[path] for path in expected} == expected


class Scaled(nn.Module):
    """By a tensor that it is not given."""

    by: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Reads(nn.Module):
    """One of its modules reads a tensor that it is not given, one counts; one draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.drop, self.norm = Scaled(), nn.Dropout(0.3), nn.BatchNorm1d(8)
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.scaled.by = torch.tanh(x)
        x = self.own(self.norm(self.drop(self.scaled(x)))) + 1
        del self.scaled.by
        return x


def test_what_does_not_do_the_same_in_slices_is_not_looked_at() -> None:
    children = children_of(Reads().float(), torch.randn(6, 8))
    assert {path: child.plain for path, child in children.items()} == {
        SELF: False, "scaled": False, "drop": True, "norm": False, "own": True,
    }  # fmt: skip


class Rewrites(nn.Module):
    """Writes into what one of its modules was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        y = self.first(h).relu()
        h.data.add_(1)
        return self.second(y) + h


def test_a_module_whose_argument_is_written_into_later_does_not_run_again() -> None:
    children = children_of(Rewrites(), torch.randn(6, 8))
    assert not children["first"].stays
    assert children["second"].stays


# --- running -----------------------------------------------------------------------------------


def gradients(module: nn.Module, forward: Callable[..., Any], *args: Any) -> list[Tensor]:
    """Results, and gradients of arguments and parameters, for random gradients of the results."""
    leaves, structure = pytree.tree_flatten(args)
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    made = pytree.tree_leaves(forward(*pytree.tree_unflatten(leaves, structure)))
    weights = [random(*tensor.shape, seed=at).to(tensor.dtype) for at, tensor in enumerate(made)]
    wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *module.parameters()]
    return [t.detach() for t in made] + list(torch.autograd.grad(made, wanted, weights))


def in_slices(module: nn.Module, child: Child, dim: int, n: int) -> InSlices:
    def otherwise(*args: Any) -> Any:
        pytest.fail("not in slices")

    return InSlices(module, module.forward, child, child.axis(dim), n, Settings(module), otherwise)


@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("name", [name for name, (_, _, dims) in MODULES.items() if dims])
def test_slices_give_results_and_gradients_of_the_whole(name: str, n: int) -> None:
    module, args, dims = MODULES[name]
    child = child_of(module.double(), *args)
    expected = gradients(module, module.forward, *args)
    for dim in dims:
        got = gradients(module, in_slices(module, child, dim, n), *args)
        for one, other in zip(expected, got, strict=True):
            assert one.stride() == other.stride()
            # Of products in single precision processors add up the terms in another order for other shapes.
            close = (1e-5, 1e-5) if "single" in name else (1e-12, 1e-12)
            torch.testing.assert_close(one, other, rtol=close[0], atol=close[1])


def test_gradients_that_are_one_tensor_are_summed_apart() -> None:
    """Autograd returns the same tensor for both terms of a sum; each has its own total."""
    module = Of(lambda x, a, b: x.sin() + (a + b))
    args = random(9, 4), random(4), random(4, seed=2)
    expected = gradients(module, module.forward, *args)
    got = gradients(module, in_slices(module, child_of(module, *args), 0, 4), *args)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_tensor_given_twice_is_one_tensor_to_a_slice() -> None:
    module = Of(lambda x, y: (x * 2) if x is y else x + y)
    x = random(9, 4).requires_grad_()
    child = child_of(module, x, x)
    (axis, *_) = independent_axes(Of(lambda x, y: x + y), child)
    forward = InSlices(module, module.forward, child, axis, 3, Settings(module), module.forward)
    torch.testing.assert_close(forward(x, x), 2 * x)
    forward(x, x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2))


def test_sums_of_half_precision_are_rounded_once() -> None:
    """64 slices rounded each on its own would be some per cent off."""
    module, x = nn.Linear(8, 8).bfloat16(), random(512, 8).bfloat16()
    child = child_of(module, x)
    whole = gradients(module.float(), module.forward, x.float())
    in_pieces = gradients(module.bfloat16(), in_slices(module, child, 0, 64), x)
    for one, other in zip(whole[2:], in_pieces[2:], strict=True):
        assert float((one - other.float()).abs().max() / one.abs().max()) < 2**-7


def test_slices_run_again_under_forwards_autocast() -> None:
    module, x = nn.Linear(8, 8), random(9, 8).float()
    child = child_of(module, x)

    def autocasting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run

    expected = gradients(module, autocasting(module.forward), x)
    got = gradients(module, autocasting(in_slices(module, child, 0, 2)), x)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert got[0].dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["argument", "weight"])
def test_what_is_written_into_before_backward_is_an_error(what: str) -> None:
    module, x = nn.Linear(8, 8).double(), random(9, 8)
    given = (x * 1).requires_grad_()
    made = in_slices(module, child_of(module, x), 0, 2)(given)
    with torch.no_grad():
        (given if what == "argument" else module.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize("change", ["a setting", "a layer", "a hook", "a shape"])
def test_a_module_that_is_not_what_it_was_runs_otherwise(change: str) -> None:
    """With a warning: what was shown of it need not hold any longer."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)).double()
    x = random(9, 8)
    child = child_of(module, x)
    calls: list[int] = []

    def otherwise(x: Tensor) -> Any:
        calls.append(1)
        return module.forward(x)

    forward = InSlices(module, module.forward, child, child.axis(0), 2, Settings(module), otherwise)
    forward(x)
    assert not calls
    if change == "a setting":
        module[1].p = 0.5
    elif change == "a layer":
        module[1] = nn.Softmax(0)
    elif change == "a hook":
        module[0].register_forward_hook(lambda module, args, result: None)
    else:
        x = random(7, 8)
    with pytest.warns(UserWarning, match="is not run in slices"):
        forward(x)
    assert calls


class Switched(nn.Module):
    """Mixes what it is given if something says so."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self._mix, self.options = nn.Linear(8, 8), False, {"mix": False}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.register_buffer("on", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x)
        if self._mix or self.options["mix"] or bool(self.on):
            x = x - x.mean(0, True)
        return self.act(x)


@pytest.mark.parametrize("what", ["a name", "an option", "a function", "a buffer"])
def test_a_switch_that_is_turned_is_seen(what: str) -> None:
    module, x = Switched().double(), random(9, 8)
    child = child_of(module, x)
    forward = InSlices(module, module.forward, child, child.axis(0), 2, Settings(module), module.forward)
    if what == "a name":
        module._mix = True
    elif what == "an option":
        module.options["mix"] = True
    elif what == "a function":
        module.act = lambda x: x.softmax(0)
    else:
        module.on.fill_(True)
    with pytest.warns(UserWarning, match="settings have changed"):
        torch.testing.assert_close(forward(x), module(x))


def test_a_buffer_that_is_given_the_values_it_has_is_no_switch() -> None:
    module, x = Switched().double(), random(9, 8)
    child = child_of(module, x)
    forward = InSlices(module, module.forward, child, child.axis(0), 2, Settings(module), refused)
    for _ in range(2):
        module.load_state_dict(copy.deepcopy(module.state_dict()))
        torch.testing.assert_close(forward(x), module(x))
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    torch.testing.assert_close(forward(x), module(x))


def refused(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("it is not run in slices")


def test_switches_that_are_turned_have_other_axes() -> None:
    module, x = Switched().double(), random(9, 8)
    assert {axis.dim for axis in child_of(module, x).axes} == {0}
    module.on.fill_(True)
    assert not child_of(module, x).axes


def test_what_integers_and_large_numbers_switch_is_seen() -> None:
    rows = torch.tensor([7, 1, 7, 2, 3])
    marked = Of(lambda x, ids, w: x @ w + torch.where((ids == 7).any(), x.mean(1, True), 0.0), 8, 8)
    assert not child_of(marked, random(5, 30, 8), rows).axes
    each = Of(lambda x, ids, w: x @ w * ids[:, None, None], 8, 8)
    assert {axis.dim for axis in child_of(each, random(5, 30, 8), rows).axes} == {0}
    clipped = Of(lambda x, w: torch.where(x.abs().amax() > 100, x * 100 / x.abs().amax(), x) @ w, 8, 8)
    assert not child_of(clipped, random(5, 30, 8)).axes


def test_what_is_no_tensor_is_the_modules_own() -> None:
    module = Of(lambda x: (x.sin(), len(state)))
    state: list[int] = []
    x = random(9, 4)
    forward = in_slices(module, child_of(module, x), 0, 2)
    state.append(1)
    assert forward(x)[1] == 1
    assert forward(x.requires_grad_())[1] == 1


# --- numbers and dtypes that code asks for -----------------------------------------------------

IDS = torch.arange(180).view(6, 30)
PADDED = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.8


def table(at: Tensor) -> Tensor:
    return torch.arange(200 * 8, dtype=torch.float64).view(200, 8).sin()[at]


# What whole numbers decide, and the dimensions that are independent whatever they are.
OF_WHOLE_NUMBERS: dict[str, tuple[Callable[..., Tensor], Tensor, Dims]] = {
    "look-up": (lambda x, ids: x + table(ids), IDS, {0, 1}),
    "special number": (lambda x, ids: x * (ids == 102)[..., None], IDS, {0, 1}),
    "segments": (lambda x, ids: x + table((ids == 102).cumsum(-1)), IDS, {0}),
    "segments in floating numbers": (
        lambda x, ids: x + table((ids == 102).double().cumsum(-1).long()), IDS, {0},
    ),
    "classes": (lambda x, ids: x + nn.functional.one_hot(ids % 8, 8), IDS, {0, 1}),
    "mean where special": (
        lambda x, ids: torch.where((ids == 102)[..., None], x.mean(1, True), x), IDS, {0},
    ),
    "otherwise where one is special": (lambda x, ids: x.flip(0) if (ids == 102).any() else x, IDS, set()),
    "those that are special": (lambda x, ids: x + len((ids == 102).nonzero()), IDS, set()),
    "padding": (lambda x, mask: x.masked_fill(~mask[..., None], 0), PADDED, {0, 1}),
    "mean of what is no padding": (
        lambda x, mask: (x * mask[..., None]).sum(1, True) / mask.sum(1)[:, None, None] + x, PADDED, {0},
    ),
    # Masks that no slice has less of.
    "longest": (lambda x, mask: x * mask.sum(1).amax(), PADDED, {0, 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_WHOLE_NUMBERS)
def test_axes_hold_for_whole_numbers_that_no_trial_has_met(name: str) -> None:
    function, whole, expected = OF_WHOLE_NUMBERS[name]
    module = nn.Sequential(Of(lambda x, w: torch.tanh(x @ w), 8, 8)).double()
    both = Of(lambda x, numbers: function(module(x), numbers))
    found = {axis.dim for axis in child_of(both, BATCH, whole).axes}
    assert found & {0, 1} == expected


def quantised(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax() / 127
    return x + ((x / scale).round() * scale - x).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_axes_hold_in_the_dtype_of_the_call(dtype: torch.dtype) -> None:
    """What is done in double precision alone is not what the module does."""
    x, weight = BATCH.to(dtype), (8, 24)
    plain, hidden = Of(attention, *weight).to(dtype), HIDDEN
    assert {axis.dim for axis in child_of(plain, x, hidden).axes} == {0}
    by_dtype = lambda x: x if x.dtype == torch.float64 else quantised(x)  # noqa: E731
    branch = Of(lambda x, hidden, w: attention(by_dtype(x), hidden, w), *weight)
    assert not child_of(branch.to(dtype), x, hidden).axes


def test_what_looks_at_a_number_is_not_independent() -> None:
    for limit in (0.5, 1e9):
        module = Of(lambda x, w: x @ w if x.max() < limit else x.flip(0), 8, 8)  # noqa: B023
        assert not child_of(module.double(), BATCH).axes
