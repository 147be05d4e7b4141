"""What model/running/internals.py takes of torch beyond its documented interface does what it says."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mod_tracker import ModTracker
from torch.nn.modules import module as of_all_modules
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from evoplan.cost_model.fakes import fake_tensors
from evoplan.model.running.internals import (
    as_input,
    backward_pass,
    gradients_of,
    handles,
    has_data,
    has_hooks,
    has_saving_hooks,
    holders,
    is_batched,
    is_plain,
    is_tracked,
    leaves_of,
    members,
    on_meta,
    other_forwards,
    own_view,
    parametrization_cache,
    parametrizations_made_anew,
    put_buffer,
    put_parameter,
    set_parametrization_cache,
    share_state,
    storage_key,
    transformed,
    without_graph,
    without_hooks,
)


class Noted(torch.autograd.Function):
    """The identity, whose backward notes what it is told of its pass."""

    notes: list[tuple[int, bool]] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Noted.notes.append(backward_pass())
        return grad


def noted(differentiate: Callable[[], object]) -> list[tuple[int, bool]]:
    """What nodes were told during it."""
    Noted.notes = []
    differentiate()
    return Noted.notes


def test_a_backward_pass_has_a_number_and_says_whether_it_keeps_the_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    y = Noted.apply(Noted.apply(x) * 2).sum()
    first = noted(lambda: y.backward(retain_graph=True))
    second = noted(lambda: torch.autograd.grad(y, x, retain_graph=True))
    third = noted(lambda: torch.autograd.grad(y, x))
    assert [len(set(notes)) for notes in (first, second, third)] == [1, 1, 1]  # one for both nodes
    assert [len(notes) for notes in (first, second, third)] == [2, 2, 2]
    assert [notes[0][1] for notes in (first, second, third)] == [True, True, False]
    assert len({notes[0][0] for notes in (first, second, third)}) == 3


def test_backward_passes_in_each_other_and_in_other_threads_have_numbers_of_their_own() -> None:
    class Nests(Noted):
        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            before = backward_pass()
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                torch.autograd.grad(Noted.apply(x), x)
            assert backward_pass() == before
            Noted.notes.append(before)
            return grad

    def work() -> None:
        Nests.apply(torch.ones(1, requires_grad=True)).backward(retain_graph=True)

    notes = noted(work)
    thread = threading.Thread(target=lambda: Noted.notes.extend(noted(work) and []))
    assert len({number for number, _ in notes}) == 2
    assert [keep for _, keep in notes] == [False, True]
    thread.start()
    thread.join()
    assert not {number for number, _ in Noted.notes} & {number for number, _ in notes}


def test_holders_of_a_storage_are_counted() -> None:
    tensor = torch.ones(3, 4)
    assert holders(tensor) == 1
    view, again = tensor[1:], tensor.detach()
    assert holders(tensor) == holders(view) == 3
    del view, again
    assert holders(tensor) == 1
    names = [tensor.untyped_storage()]
    assert holders(tensor) == 2
    names.append(tensor[1:].untyped_storage())
    assert names[0] is names[1], "there is one object of it, whose references are counted"
    assert holders(tensor) == 3
    names[1] = weakref.ref(names[0])
    assert holders(tensor) == 2
    del names
    assert holders(tensor) == 1
    with torch.no_grad():
        taken = tensor.detach()
        tensor.set_()
    assert (holders(taken), tensor.numel()) == (1, 0)


def test_handles_on_a_tensor_are_counted() -> None:
    tensor = torch.ones(3, 4)
    names = [tensor, tensor]
    assert handles(tensor) == 1
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    assert handles(tensor) == 2
    del capsule
    product = (tensor * torch.ones(4, requires_grad=True)).sum()
    assert handles(tensor) == 2
    del product
    assert handles(names[0]) == 1


HOOKS: dict[str, Callable[[nn.Module], RemovableHandle]] = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward with kwargs": lambda module: module.register_forward_hook(lambda *_: None, with_kwargs=True),
    "forward, always": lambda module: module.register_forward_hook(lambda *_: None, always_call=True),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "every forward": lambda _: of_all_modules.register_module_forward_hook(lambda *_: None),
    "every forward pre": lambda _: of_all_modules.register_module_forward_pre_hook(lambda *_: None),
    "every backward": lambda _: of_all_modules.register_module_full_backward_hook(lambda *_: None),
    "every backward pre": lambda _: of_all_modules.register_module_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_every_kind_are_seen(kind: str) -> None:
    linear = nn.Linear(2, 3)
    assert not has_hooks(linear)
    handle = HOOKS[kind](linear)
    try:
        assert has_hooks(linear)
        assert not is_plain(linear, nn.Linear)
    finally:
        handle.remove()
    assert not has_hooks(linear)
    assert is_plain(linear, nn.Linear)


@pytest.mark.parametrize("kind", HOOKS)
def test_a_module_without_hooks_is_its_forward(kind: str) -> None:
    """And one with a hook calls it: there is no other way to hang something on a call that we do not see."""
    called = []
    linear, x = nn.Linear(2, 3), torch.ones(1, 2, requires_grad=True)
    handle = HOOKS[kind](linear)
    try:
        hooks = [
            hook
            for owner in (linear, of_all_modules)
            for name, held in vars(owner).items()
            if name.endswith("_hooks") and isinstance(held, dict) and "state_dict" not in name
            for hook in held.values()
        ]
        assert len(hooks) == 1, "hooks lie in dictionaries of these names"
        called += hooks
    finally:
        handle.remove()
    assert called
    assert torch.equal(linear(x), linear.forward(x))


@pytest.mark.parametrize("tracker", [ModuleTracker, ModTracker])
def test_who_only_notes_which_module_runs_is_no_hook(tracker: Any) -> None:
    linear = nn.Linear(2, 3)
    leaf = torch.ones(1, 2, requires_grad=True)
    assert as_input(leaf) is without_graph(leaf) is leaf
    assert not is_tracked()
    with tracker():
        assert is_tracked()
        assert not has_hooks(linear)
        assert is_plain(linear, nn.Linear)
        handle = of_all_modules.register_module_forward_hook(lambda *_: None)
        assert has_hooks(linear)
        handle.remove()
        assert not has_hooks(linear)
    assert not is_tracked()


class OfASlice(torch.autograd.Function):
    """A module of a part of a tensor, as steps under a plan run: in the forward of a node."""

    @staticmethod
    def forward(ctx, module: nn.Module, x: Tensor) -> Tensor:
        return module(x[:2])


def test_modules_under_a_tracker_get_inputs_that_it_can_hang_hooks_on() -> None:
    linear, leaf, other = nn.Linear(2, 3), *(torch.ones(4, 2, requires_grad=True) for _ in range(2))
    with ModuleTracker():
        with pytest.raises(RuntimeError, match="A leaf node was passed"):  # why there is a view
            torch.autograd.grad(linear(other).sum(), other)
        (found,) = torch.autograd.grad(linear(as_input(leaf)).sum(), leaf)
        with pytest.raises(AssertionError, match="Expected gradient function"):  # why there is none
            OfASlice.apply(linear, leaf)
        made = OfASlice.apply(linear, without_graph(leaf))
    assert torch.equal(found, linear.weight.sum(0).expand(4, 2))
    assert torch.equal(made, linear(leaf[:2]))
    assert without_graph("no tensor") == "no tensor"


def test_plain_layers_are_torchs_own() -> None:
    class Other(nn.Linear):
        pass

    altered = nn.Linear(2, 2)
    altered.forward = lambda x: x
    assert torch.equal(altered(torch.ones(2)), torch.ones(2))  # which is how adapters are hung in
    parametrized = nn.Linear(2, 2)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert is_plain(nn.LayerNorm(2), nn.LayerNorm)
    for other in (Other(2, 2), altered, parametrized, nn.LayerNorm(2)):
        assert not is_plain(other, nn.Linear)


def test_tensors_without_data_are_known() -> None:
    assert has_data(torch.ones(2))
    assert has_data(nn.Parameter(torch.ones(2)))
    assert not has_data(torch.ones(2, device="meta"))
    with fake_tensors() as mode:
        assert not has_data(torch.ones(2))
        assert not has_data(nn.Parameter(torch.ones(2)))
        assert not has_data(torch.ones(4).view(2, 2)[0])
        assert not has_data(torch.ones(2, requires_grad=True).detach())
    assert not has_data(mode.from_tensor(torch.ones(2)))


def test_a_storage_has_one_key() -> None:
    x = torch.arange(6.0)
    views = (x, x.view(2, 3), x[4:], x[6:], x.detach(), x.view(torch.int32), nn.Parameter(x))
    assert {storage_key(view) for view in views} == {storage_key(x)}
    others = (x.clone(), torch.arange(6.0), x + 0, x[1:].contiguous().clone())
    keys = [storage_key(other) for other in others]  # while all of them live
    assert len({storage_key(x), *keys}) == 5
    key = storage_key(x)
    x.data = torch.zeros(3)
    assert storage_key(x) != key == storage_key(views[1])
    x.resize_(1000)  # in place: the memory is another, the storage is not
    assert storage_key(x) != key
    with fake_tensors():
        fake = torch.ones(4)
        assert storage_key(fake) == storage_key(fake[1:]) != storage_key(torch.ones(4))


def test_any_tensor_can_be_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 1, bias=False)))
    theirs = model[1][0].weight
    weight = torch.full((1, 2), 3.0, requires_grad=True) * 1
    put_parameter(model, "1.0.weight", weight)
    assert model[1][0].weight is weight
    assert dict(model.named_parameters())["1.0.weight"] is weight
    model[0].weight.data.fill_(1)
    made = model(torch.ones(2))
    assert made.item() == 12
    assert torch.autograd.grad(made, weight)[0].tolist() == [[2, 2]]
    put_parameter(model, "1.0.weight", theirs)
    assert model[1][0].weight is theirs
    with pytest.raises(AttributeError):
        put_parameter(model, "2.weight", theirs)


class Doubled(nn.Module):
    """A parametrization that counts."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return 2 * weight


def test_the_cache_of_parametrizations_counts_who_has_it_open() -> None:
    linear, doubled = nn.Linear(2, 2), Doubled()
    parametrize.register_parametrization(linear, "weight", doubled)

    def calls() -> int:
        before = doubled.calls
        assert linear.weight.shape == linear.weight.shape
        return doubled.calls - before

    assert (parametrization_cache(), calls()) == (0, 2)
    with parametrize.cached():
        assert (parametrization_cache(), calls()) == (1, 1)
        with parametrize.cached():
            assert (parametrization_cache(), calls()) == (2, 0)
            set_parametrization_cache(0)
            assert (parametrization_cache(), calls()) == (0, 2)
            set_parametrization_cache(2)
            assert calls() == 0  # what was in it is still there
    assert (parametrization_cache(), calls()) == (0, 2)


class Counted(nn.Module):
    """A module with all that one may have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.weight)


def test_a_view_has_all_of_a_modules_state_whenever_it_is_hung_there() -> None:
    module, view = Counted(), Counted()
    share_state(view, module)
    assert dict(view.named_parameters()).keys() == dict(module.named_parameters()).keys()
    for ours, theirs in ((view.parameters, module.parameters), (view.buffers, module.buffers)):
        assert [id(tensor) for tensor in ours()] == [id(tensor) for tensor in theirs()]
    assert view.inner is module.inner
    module.register_parameter("late", nn.Parameter(torch.ones(1)))
    view.register_buffer("later", torch.ones(1))
    module.added = nn.Linear(1, 1)
    assert view.late is module.late
    assert module.later is view.later
    assert view.added is module.added
    called = []
    handles = [
        module.register_forward_hook(lambda *_: called.append("forward")),
        module.register_forward_pre_hook(lambda *_: called.append("pre")),
        module.register_full_backward_pre_hook(lambda *_: called.append("backward pre")),
    ]
    view(torch.ones(1)).sum().backward()
    assert called == ["pre", "forward", "backward pre"]
    for handle in handles:
        handle.remove()
    assert not has_hooks(view)
    assert view.state_dict().keys() == module.state_dict().keys()
    view.load_state_dict({name: torch.full_like(value, 5) for name, value in view.state_dict().items()})
    assert module.weight.item() == 5


def test_a_view_of_a_module_with_a_full_backward_hook_calls_it() -> None:
    """Whether the hook is of the old kind is said beside the dictionaries."""
    module, view, called = Counted(), Counted(), []
    module.register_full_backward_hook(lambda *_: called.append("backward"))
    share_state(view, module)
    view(torch.ones(1, requires_grad=True)).sum().backward()
    assert called == ["backward"]
    assert view.training  # which is each one's own
    module.eval()
    assert view.training


def test_a_parameters_hooks_rest_and_are_there_again() -> None:
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda grad: grad * 5)
    with without_hooks([weight]):
        (alone,) = torch.autograd.grad((weight * 3).sum(), weight)
    assert alone.tolist() == [3, 3]
    (weight * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [15, 15]
    seen: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(seen.append)
    with without_hooks([weight]):
        weight.sum().backward()
    assert not seen
    weight.sum().backward()
    assert len(seen) == 1


def test_leaves_are_those_that_get_gradients() -> None:
    one, other, frozen = (torch.ones(2, requires_grad=wanted) for wanted in (True, True, False))
    found = leaves_of(((one * other).sin() @ frozen + one.sum()).exp())
    assert {id(leaf) for leaf in found} == {id(one), id(other)}
    assert len(found) == 2
    assert not leaves_of(frozen)


def test_saving_hooks_are_seen_where_they_are() -> None:
    assert not has_saving_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert has_saving_hooks()
    seen: list[bool] = []

    def noting(x: torch.Tensor) -> torch.Tensor:
        seen.append(has_saving_hooks())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(noting, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]
    assert not has_saving_hooks()


def test_any_tensor_can_be_a_buffer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    other = torch.full((3,), 7.0)
    put_buffer(model, "0.running_mean", other)
    assert model[0].running_mean is other
    assert list(model.state_dict()) == list(nn.Sequential(nn.BatchNorm1d(3)).state_dict())


def test_other_forwards_go_again_also_where_there_was_one() -> None:
    plain, changed = nn.Linear(2, 2), nn.Linear(2, 2)
    own = changed.forward = lambda x: x + 1
    x = torch.ones(2)
    with other_forwards({plain: lambda x: x * 2, changed: lambda x: x * 3}):
        assert plain(x).tolist() == [2, 2]
        assert changed(x).tolist() == [3, 3]
    assert "forward" not in plain.__dict__
    assert changed.forward is own


def test_members_are_what_a_modules_own_methods_find() -> None:
    """In their order and by their names, shared ones once; what is not there is none."""
    shared = nn.Linear(2, 2)
    module = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm1d(2)), nn.ModuleDict({"again": shared, "b": nn.ReLU()})
    )
    module.tied = nn.Linear(2, 2, bias=False)
    module.tied.weight = shared.weight
    module.register_module("none", None)
    found = members(module)
    assert found.modules == list(module.modules())
    for ours, theirs in (
        (found.parameters, module.named_parameters()),
        (found.buffers, module.named_buffers()),
    ):
        for (name, tensor), (expected, same) in zip(ours.items(), theirs, strict=True):
            assert name == expected
            assert tensor is same


def test_what_is_made_on_meta_is_nobodys_business() -> None:
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    before = torch.get_rng_state()
    with Watching(), fake_tensors(), on_meta():
        layer = nn.Linear(3, 5)
    assert layer.weight.is_meta
    assert type(layer.weight.data) is Tensor
    assert not seen
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.zeros(1).is_meta


def test_a_view_of_ones_own_may_be_written_into_at_no_cost() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    made = own_view(x * 3.0, (2, 3, 2))
    assert made.shape == (2, 3, 2)
    assert not made._is_view()
    made.mul_(2.0)
    assert "CopySlices" not in type(made.grad_fn).__name__
    made.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 6.0))


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_of_an_edge_are_those_of_autograd(keep: bool) -> None:
    x, w, other = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    made = (x @ w).sin()
    grad = torch.randn_like(made)
    expected = torch.autograd.grad(made, [x, w], grad, retain_graph=True)
    edge = torch.autograd.graph.get_gradient_edge(made)
    *found, none = gradients_of(edge, [x, w, other], grad, keep)
    assert none is None
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert x.grad is None
    if keep:
        gradients_of(edge, [x], grad, False)
    with pytest.raises(RuntimeError, match="second time"):
        gradients_of(edge, [x], grad, False)


def test_what_differentiates_or_batches_from_outside_is_seen() -> None:
    x, seen = torch.randn(3), list[str | None]()

    def noted(x: Tensor) -> Tensor:
        seen.append(transformed())
        return x.sin().sum()

    torch.func.grad(noted)(x)
    torch.func.vmap(noted)(x)
    with torch.autograd.forward_ad.dual_level():
        noted(x)
    noted(x.requires_grad_()).backward()
    assert [None if said is None else said[:7] for said in seen] == ["torch.f"] * 2 + ["forward", None]

    found = list[bool]()
    y = x.sin()
    y.register_hook(lambda grad: found.append(is_batched(grad)))
    torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True, retain_graph=True)
    torch.func.vmap(lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0])(torch.ones(2, 3))
    torch.autograd.grad(y, x, torch.ones(3))
    assert found == [True, True, False]


def test_parametrizations_are_made_anew_where_that_is_asked_for() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with parametrize.cached():
        before = layer.weight
        with parametrizations_made_anew():
            assert layer.weight is not layer.weight
        assert layer.weight is before
