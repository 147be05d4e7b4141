"""What evoplan needs of torch beyond its documented interface: all of it here, each with a test of its own.

Checked with torch 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize as _parametrize
from torch.utils import checkpoint as _checkpoint
from torch.utils._python_dispatch import _disable_current_modes

# Where torch has its trackers of modules, of which the second needs more imports than there may be.
_TRACKERS = {"torch.utils.module_tracker", "torch.distributed._tools.mod_tracker"}
_SELECTIVE = (_checkpoint._CachingTorchDispatchMode, _checkpoint._CachedTorchDispatchMode)


def backward_pass() -> tuple[int, bool]:
    """Inside a node's backward: the number of the backward pass, and whether it is told to keep the graph."""
    return torch._C._current_graph_task_id(), torch._C._autograd._get_current_graph_task_keep_graph()


@contextmanager
def on_meta() -> Iterator[None]:
    """What is made inside has no data, and nobody who watches operators sees that it is made."""
    with _disable_current_modes(), torch.device("meta"):
        yield


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of its own, or those of every module.

    torch's own trackers of modules, which only note who runs, are none of them.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (_module._has_any_global_hook() and _has_global_hooks())
    )


def is_tracked() -> bool:
    """Whether there are hooks of every module: a FlopCounterMode notes by them who runs."""
    return bool(_module._has_any_global_hook())


def _has_global_hooks() -> bool:
    forward = _module._global_forward_pre_hooks, _module._global_forward_hooks
    backward = _module._global_backward_pre_hooks, _module._global_backward_hooks
    others = (hook for hooks in forward for hook in hooks.values() if not _is_trackers(hook))
    return any(backward) or any(True for _ in others)


def _is_trackers(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None))
    return any(kind.__module__ in _TRACKERS for kind in owner.__mro__)


def as_input(leaf: Tensor) -> Tensor:
    """A leaf as modules are to be given it.

    Who tracks modules hangs hooks for several tensors (`register_multi_grad_hook`) on their inputs, which
    torch cannot have on a leaf of which `torch.autograd.grad` finds the gradient: a view of it can.
    """
    return leaf.view_as(leaf) if is_tracked() else leaf


def without_graph(leaf: Any) -> Any:
    """What modules are given where nothing is recorded, tensors or not.

    A view of a tensor that requires a gradient says there that it does too, and has no graph in which hooks
    for several tensors could be.
    """
    return leaf.detach() if isinstance(leaf, Tensor) and is_tracked() else leaf


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is one of torch's as it comes: no subclass, no other forward, nothing hung on it."""
    return type(layer) is kind and "forward" not in layer.__dict__ and not has_hooks(layer)


def has_data(tensor: Tensor) -> bool:
    """Whether there are numbers in it: it is neither on the meta device nor a fake one."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def keeps_results() -> bool:
    """Whether a selective checkpoint is at work: it notes or gives back the results of operators."""
    if not torch._C._len_torch_dispatch_stack():  # asked often, and hardly ever more than this
        return False
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, _SELECTIVE) for mode in modes)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share a storage, while one of them lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def handles(tensor: Tensor) -> int:
    """How many hold the tensor itself, besides names in Python: it is one; DLPack and graphs add theirs."""
    count: int = tensor._use_count()  # type: ignore[attr-defined]
    return count


def holders(tensor: Tensor) -> int:
    """How many hold a tensor's storage: tensors, itself among them, and names that it has in Python."""
    storage = tensor.untyped_storage()  # one more, while it is asked
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1 + _references(tensor) - 1 - _references_of_own()


def _references(tensor: Tensor) -> int:
    """To the one object that Python has of a tensor's storage, whoever asks for it; while it is asked."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


@cache
def _references_of_own() -> int:
    """The same where nobody else holds it, which differs between versions of Python."""
    return _references(torch.empty(0))


def own_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, which nobody else has, in another shape: no view to autograd, free to be written into."""
    viewed: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return viewed


class Members(NamedTuple):
    """A module and those within it, each once; their parameters and buffers by the names that
    `named_parameters` and `named_buffers` give them.

    Attributes:
        tied, tied_buffers: further names of parameters and of buffers, with those that they are listed under.
    """

    modules: list[nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tied: dict[str, str]
    tied_buffers: dict[str, str]


def members(module: nn.Module) -> Members:
    """Those of a module, in one walk: a block may have hundreds of modules, and is asked at every step."""
    paths: dict[nn.Module, str] = {}
    todo = [(module, "")]
    while todo:
        inner, path = todo.pop()
        if inner not in paths:
            paths[inner] = path
            below = [(child, f"{path}{name}.") for name, child in inner._modules.items() if child is not None]
            todo += reversed(below)
    found, known = Members(list(paths), {}, {}, {}, {}), dict[int, str]()
    for inner, path in paths.items():
        of_parameters = found.parameters, found.tied, inner._parameters
        of_buffers = found.buffers, found.tied_buffers, inner._buffers
        for there, tied, own in (of_parameters, of_buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                first = known.setdefault(id(tensor), path + name)
                if first == path + name:
                    there[first] = tensor
                else:
                    tied[path + name] = first
    return found


def gradients_of(
    edge: torch.autograd.graph.GradientEdge, inputs: Sequence[Tensor], grad: Tensor, keep: bool
) -> tuple[Any, ...]:
    """torch.autograd.grad of one edge, whose gradient fits, without its questions: steps ask it often.

    Args:
        keep: the graph, for another time.
    """
    engine = torch.autograd.Variable._execution_engine
    found: tuple[Any, ...] = engine.run_backward(
        (edge,), (grad,), keep, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return found


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a backward from a tensor adds gradients to."""
    seen, todo, found = set[Any](), [tensor.grad_fn], list[Tensor]()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            found += [node.variable] if hasattr(node, "variable") else []
    return found


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leaves whose own hooks do not run: a parameter's do once, when its gradient is added up."""
    own = (hooks for t in tensors for hooks in (t._backward_hooks, t._post_accumulate_grad_hooks))
    hooks = [of_one for of_one in own if of_one]
    saved = [dict(of_one) for of_one in hooks]
    for of_one in hooks:
        of_one.clear()
    try:
        yield
    finally:
        for of_one, before in zip(hooks, saved, strict=True):
            of_one.update(before)


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forwards than their own, on the instances: hooks, names and classes stay."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def has_saving_hooks() -> bool:
    """Whether something else keeps tensors in autograd's place: a checkpoint around this code, say."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def transformed() -> str | None:
    """What differentiates or batches this code from outside, where no backward does; None: nothing."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (grad, vjp, jvp, vmap)"
    return "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0 else None


def is_batched(tensor: Tensor) -> bool:
    """Whether it is several at once: under torch.func.vmap, or in a backward with `is_grads_batched`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def put_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Have a tensor be the module's parameter of that name, whether or not it is an `nn.Parameter`."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = tensor  # type: ignore[assignment]


def put_buffer(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Have a tensor be the module's buffer of that name."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._buffers[last] = tensor


def parametrization_cache() -> int:
    """How many `torch.nn.utils.parametrize.cached()` are open."""
    count: int = _parametrize._cache_enabled
    return count


def set_parametrization_cache(count: int) -> None:
    """Have so many be open; with none, parametrized weights are made at every use."""
    _parametrize._cache_enabled = count


@contextmanager
def parametrizations_made_anew() -> Iterator[None]:
    """Inside, no `torch.nn.utils.parametrize.cached()` is open, and nothing is kept for those that are."""
    before = parametrization_cache()
    set_parametrization_cache(0)
    try:
        yield
    finally:
        set_parametrization_cache(before)


def share_state(view: nn.Module, module: nn.Module) -> None:
    """Give a module another's parameters, buffers, children and hooks by name: the same dictionaries."""
    for name, value in module.__dict__.items():
        if isinstance(value, dict) or name == "_is_full_backward_hook":
            view.__dict__[name] = value
