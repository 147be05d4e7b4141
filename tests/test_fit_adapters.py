"""Modules of other people's models that are submodules of ours: shown to be, and run so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evoplan
from evoplan.cost_model.menus import strategies_of
from evoplan.model.adapters import adapter_of
from evoplan.model.adapters.adapter import _ADAPTERS, Adapter
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.children import Child
from evoplan.model.foreign.declared import AsDeclared, declared, run
from evoplan.model.running.kernels import kernels_for
from evoplan.model.running.strategy import Strategy
from tests.test_fit_axes import child_of
from tests.zoo import random

pytest.importorskip("openfold3")
pytest.importorskip("boltz")
with warnings.catch_warnings(record=True):  # of GPU kernels that are not there
    from boltz.model.layers.triangular_attention.attention import (
        TriangleAttentionEndingNode,
        TriangleAttentionStartingNode,
    )
    from openfold3.core.model.layers.msa import MSAColumnAttention, MSARowAttentionWithPairBias
    from openfold3.core.model.layers.outer_product_mean import OuterProductMean
    from openfold3.core.model.layers.triangular_attention import TriangleAttention
    from openfold3.core.model.layers.triangular_multiplicative_update import (
        TriangleMultiplicationIncoming,
        TriangleMultiplicationOutgoing,
    )

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
C_M, C_Z, HEADS, C_HEAD, S, R = 6, 8, 2, 3, 5, 7
TILED = kernels_for("cpu")[0]


def mask(*shape: int) -> Tensor:
    """Some of each; the first row is all there, and the last column is not."""
    drawn = (random(*shape) > -0.5).double()
    drawn[..., 0, :], drawn[..., -1] = 1, 0
    return drawn


def of_pairs(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, ...]:
    return make, (random(1, R, R, C_Z),), {"mask": mask(1, R, R), **options}


# A module of theirs and what it is called with.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "outgoing": of_pairs(lambda: TriangleMultiplicationOutgoing(C_Z, 4)),
    "incoming": of_pairs(lambda: TriangleMultiplicationIncoming(C_Z, 4), _add_with_inplace=True),
    "starting": of_pairs(lambda: TriangleAttention(C_Z, C_HEAD, HEADS)),
    "ending": of_pairs(lambda: TriangleAttention(C_Z, C_HEAD, HEADS), transpose_bias=True),
    "ending node": of_pairs(lambda: TriangleAttention(C_Z, C_HEAD, HEADS, starting=False)),
    "turned twice": of_pairs(
        lambda: TriangleAttention(C_Z, C_HEAD, HEADS, starting=False), transpose_bias=True
    ),
    "boltz, starting": of_pairs(lambda: TriangleAttentionStartingNode(C_Z, C_HEAD, HEADS)),
    "boltz, ending": of_pairs(lambda: TriangleAttentionEndingNode(C_Z, C_HEAD, HEADS)),
    "row": (
        lambda: MSARowAttentionWithPairBias(C_M, C_Z, C_HEAD, HEADS),
        (random(1, S, R, C_M), random(1, R, R, C_Z)),
        {"mask": mask(1, S, R)},
    ),
    "column": (
        lambda: MSAColumnAttention(C_M, C_HEAD, HEADS),
        (random(1, S, R, C_M),),
        {"mask": mask(1, R, S).mT.contiguous()},
    ),
    "outer product": (
        lambda: OuterProductMean(C_M, C_Z, 3), (random(1, S, R, C_M),), {"mask": mask(1, S, R)}
    ),
    "no mask": (lambda: TriangleMultiplicationOutgoing(C_Z, 4), (random(1, R, R, C_Z),), {"mask": None}),
    "a mask for a batch": (
        lambda: TriangleAttention(C_Z, C_HEAD, HEADS), (random(3, R, R, C_Z),), {"mask": mask(1, R, R)}
    ),
}  # fmt: skip


def module_of(name: str) -> nn.Module:
    module = CASES[name][0]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():  # theirs start at zero, some of them
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return module


def child_of_case(module: nn.Module, name: str) -> Child:
    """The module as a block calls it."""
    _, args, kwargs = CASES[name]
    return child_of(module, *(arg.clone().requires_grad_() for arg in args), **kwargs)


def gradients(module: nn.Module, forward: Callable[..., Tensor], name: str) -> list[Tensor]:
    """Its result, and gradients of arguments and parameters."""
    _, args, kwargs = CASES[name]
    leaves = [arg.clone().requires_grad_() for arg in args]
    made = forward(*leaves, **kwargs)
    weights = random(*made.shape)
    found = torch.autograd.grad((weights * made.square()).mean(), [*leaves, *module.parameters()])
    return [made.detach(), *found]


def strategies(name: str) -> Iterator[Strategy]:
    """All that there are, in uneven pieces."""
    module = module_of(name)
    _, args, kwargs = CASES[name]
    adapter = adapter_of(module)
    assert adapter is not None
    adapted = adapter.adapted(module, args, kwargs)
    assert adapted is not None
    axis = adapted.submodule.axes[0].name
    for kernel in ["eager", TILED] if adapted.submodule.attends else ["eager"]:
        for kind in ("whole", "lean"):
            yield Strategy(kind, kernel=kernel)
        for n in (1, 2, 3, 64):
            yield Strategy("chunk", axis, n, kernel)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_modules_own(name: str) -> None:
    module = module_of(name)
    _, args, kwargs = CASES[name]
    adapter = adapter_of(module)
    assert adapter is not None
    expected = gradients(module, module, name)
    for strategy in strategies(name):

        def as_declared(*args: Any, strategy: Strategy = strategy, **kwargs: Any) -> Tensor:
            adapted = adapter.adapted(module, args, kwargs)
            assert adapted is not None
            return run(adapted, strategy, name)

        for got, right in zip(gradients(module, as_declared, name), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(as_declared(*args, **kwargs), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_what_it_is_is_shown(name: str) -> None:
    module = module_of(name)
    found, child = declared(module, child_of_case(module, name)), child_of_case(module, name)
    assert found is not None
    (made,) = child.results
    assert set(found.axes.values()) <= set(made.shape)
    assert found.attends == any(strategy.kernel == TILED for strategy in strategies(name))


def wrong(name: str, **changes: Any) -> Adapter:
    adapter = adapter_of(module_of(name))
    assert adapter is not None
    layers = {**adapter.layers, **changes.pop("layers", {})}
    return replace(adapter, layers=layers, **changes)


def calls_with(name: str, change: Callable[[Any], Any]) -> Adapter:
    """An adapter that asks for something a little else."""
    right = wrong(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        made = right.call(*args, **kwargs)
        return made and change(made)

    return replace(right, call=call)


WRONG: dict[str, Callable[[], tuple[str, Adapter]]] = {
    "operands change places": lambda: (
        "outgoing", wrong("outgoing", layers={"linear_a": "linear_b_p", "linear_b": "linear_a_p"})
    ),
    "gates change places": lambda: (
        "incoming",
        wrong("incoming", layers={"linear_a_gate": "linear_b_g", "linear_b_gate": "linear_a_g"}),
    ),
    "the other direction": lambda: (
        "outgoing", calls_with("outgoing", lambda call: replace(call, kind=("incoming", *call.kind[1:])))
    ),
    "a bias that is turned": lambda: (
        "ending", calls_with("ending", lambda call: replace(call, kind=("ending", True, *call.kind[2:])))
    ),
    "no mask": lambda: (
        "starting",
        calls_with(
            "starting",
            lambda call: replace(
                call, tensors={**call.tensors, "pair_mask": torch.ones_like(call.tensors["pair_mask"])}
            ),
        ),
    ),
    "heads of other widths": lambda: (
        "row", calls_with("row", lambda call: replace(call, kind=(*call.kind[:2], C_HEAD, HEADS)))
    ),
    "factors change places": lambda: (
        "outer product",
        wrong("outer product", layers={"linear_a": "linear_2", "linear_b": "linear_1"}),
    ),
    "another count of sequences": lambda: (
        "outer product",
        calls_with(
            "outer product",
            lambda call: replace(
                call, tensors={**call.tensors, "pair_count": call.tensors["pair_count"] + 1e-3}
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_adapter_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, adapter = WRONG[what]()
    module = module_of(name)
    monkeypatch.setitem(_ADAPTERS, (adapter.module, adapter.name), adapter)
    assert adapter_of(module) is adapter
    assert declared(module, child_of_case(module, name)) is None


def test_a_subclass_is_not_its_class() -> None:
    class Mine(TriangleAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return 2 * super().forward(x, mask)

    assert adapter_of(Mine(C_Z, C_HEAD, HEADS)) is None


def patched_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def patched_within(module: Any) -> None:
    forward = module.mha.forward
    module.mha.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def another_layer(module: Any) -> None:
    module.mha.linear_q = nn.Sequential(
        module.mha.linear_q, nn.Linear(HEADS * C_HEAD, HEADS * C_HEAD).double()
    )


def a_hook_within(module: Any) -> None:
    module.mha.register_forward_hook(lambda module, args, output: 3 * output)


def another_constant(module: Any) -> None:
    module.inf = 1.0


CHANGES = [patched_forward, patched_within, another_layer, a_hook_within, another_constant]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_since_runs_as_it_is(change: Callable[[nn.Module], None]) -> None:
    """Under the plan that was made before, with a warning: more memory, and the right gradients."""
    module = module_of("starting")
    child, settings = child_of_case(module, "starting"), Settings(module)
    change(module)
    expected = gradients(module, module, "starting")
    planned = AsDeclared(
        module, module.forward, child, Strategy.parse("chunk(row, 3)"), settings, module.forward
    )
    with pytest.warns(UserWarning, match="takes more memory than planned"):
        got = gradients(module, lambda *args, **kwargs: called(module, planned, *args, **kwargs), "starting")
    for one, right in zip(got, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


def called(module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The module with another forward, hooks and all, as a plan calls it."""
    from evoplan.model.running.internals import other_forwards

    with other_forwards({module: forward}):
        return module(*args, **kwargs)


def test_a_mask_that_wants_a_gradient_gets_one() -> None:
    module = module_of("outgoing")
    child, settings = child_of_case(module, "outgoing"), Settings(module)
    z, given = random(1, R, R, C_Z), mask(1, R, R)
    planned = AsDeclared(
        module, module.forward, child, Strategy.parse("chunk(row, 3)"), settings, module.forward
    )
    grads = []
    for forward in (module, planned):
        wanted = given.clone().requires_grad_()
        forward(z, mask=wanted).square().mean().backward()
        grads.append(wanted.grad)
    assert torch.equal(*grads)


def test_the_graph_is_kept_when_it_is_asked_for() -> None:
    module = module_of("starting")
    adapter = adapter_of(module)
    _, args, kwargs = CASES["starting"]
    for strategy in strategies("starting"):
        x = args[0].clone().requires_grad_()
        adapted = adapter.adapted(module, (x,), kwargs)
        loss = run(adapted, strategy, "it").square().mean()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        second = torch.autograd.grad(loss, x)
        assert torch.equal(*first, *second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)


def test_what_is_written_into_in_between_is_an_error() -> None:
    module = module_of("outgoing")
    adapter = adapter_of(module)
    _, args, kwargs = CASES["outgoing"]
    for strategy in strategies("outgoing"):
        x = (args[0] + 0).requires_grad_()
        held = x * 1.0
        made = run(adapter.adapted(module, (held,), kwargs), strategy, "it")
        with torch.no_grad():
            held.mul_(2)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            made.square().mean().backward()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.product = module_of("starting"), module_of("outgoing")

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.attention(z, mask=mask)
        return z + self.product(z, mask=mask)


class Model(nn.Module):
    """Blocks with modules that have adapters, of which torch.nn alone knows the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            z = block(z, mask)
        return z


@pytest.mark.parametrize("times", ["predicted", "measured"])
def test_a_plan_uses_them(times: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, args = Model(), (random(1, 16, 16, C_Z), mask(1, 16, 16))
    fitted = evoplan.fit(model, args, times=times)
    assert fitted.plan.costs["time"] == ("measured" if times == "measured" else fitted.plan.costs["time"])
    fitted.replan(fitted.plan.least_feasible_bytes)
    ways = {way for strategy in fitted.plan.strategies for _, way in strategy.modules}
    assert any(way.startswith("chunk(row, ") for way in ways)
    found = fitted.verify(args)
    assert found.ok
    assert found.max_gradient_error < 1e-10
    assert 0.98 <= found.measured_peak_bytes / found.predicted_peak_bytes <= 1
    fitted.plan.save(tmp_path / "plan.json")
    fitted.remove()
    again = evoplan.fit(copy.deepcopy(model), args, plan=tmp_path / "plan.json")
    assert again.plan.schedule == fitted.plan.schedule


def test_knobs_that_are_turned_leave_them_out() -> None:
    """With a chunk_size a module computes otherwise: what its own code does stands."""
    fitted = evoplan.fit(Model(), (random(1, 16, 16, C_Z), mask(1, 16, 16)))
    children = fitted._fitting.captured.calls[1].children
    turned = [one for one in strategies_of(children, [{"chunk_size": "4"}]) if one.knobs]
    assert turned
    assert all(way == "redo" for strategy in turned for _, way in strategy.modules)


def test_an_adapter_that_is_another_now_is_shown_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What an earlier one was shown to be is on disk, and nothing of it is believed."""
    monkeypatch.setenv("EVOPLAN_TRACES", str(tmp_path))
    args = random(1, 16, 16, C_Z), mask(1, 16, 16)

    def products() -> set[str]:
        costs = evoplan.fit(Model(), args)._fitting.table.options[1]
        return {way for cost in costs for path, way in cost.strategy.modules if path == "product"}

    assert any(way.startswith("chunk(row") for way in products())
    name, adapter = WRONG["operands change places"]()
    monkeypatch.setitem(_ADAPTERS, (adapter.module, adapter.name), adapter)
    assert name == "outgoing"
    assert not any(way.startswith("chunk(row") for way in products())
