"""A forward that is watched: every call of a module, and every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.model.foreign.attributes import plain_tensors, tensors_in_attributes
from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.visits import Visit, keys_of, numbers_in
from evoplan.model.foreign.writes import given_as, written
from evoplan.model.running.internals import backward_pass, has_saving_hooks, storage_key
from evoplan.model.running.random_state import OtherState
from evoplan.model.running.unchanged import Mark, marks


@dataclass(frozen=True)
class Operator:
    """One operator that ran: what tells it from others, whether it draws, and storages: those that it read,
    of them those that a gradient is wanted of, those that it wrote into, counted or not (`.data` counts for
    nobody else), and new ones.
    """

    about: str
    draws: bool
    read: frozenset[int]
    wanted: frozenset[int]
    wrote: frozenset[int]
    made: frozenset[int]


# Kernels whose results, or choice among several, depend on the device.
UNLIKE = (
    r"aten\._?(native_)?(\w*conv|\w*batch_norm|\w*group_norm|scaled_dot|\w*pool|\w*fft|lstm|gru|rnn|upsample)"
)


# Run by one kernel or by many operators, as the device has it.
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

# Those whose gradients may be sparse.
_SPARSE = {id(op) for op in (torch.ops.aten.embedding.default, torch.ops.aten._embedding_bag.default)}


class Functions(TorchFunctionMode):
    """Whether torch's attention or recurrent layers are called, which are other operators on each device."""

    unlike = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward, *_RECURRENT):
            self.unlike = True
        return func(*args, **(kwargs or {}))


class _Found:
    """What a call finds in its modules, to tell what it has done to that.

    Args:
        buffers: whether there are any.
        others: whether to look who draws from Python's and NumPy's generators.
    """

    def __init__(self, visit: Visit, buffers: bool, others: bool) -> None:
        self.visit, self.has_buffers = visit, buffers
        self.buffers = self._buffers()
        self.there = tensors_in_attributes(visit.module)  # held, as another could lie in its place
        self.plain, self.others = marks(self.there), OtherState() if others else None

    def _buffers(self) -> dict[str, Mark]:
        return marks(dict(self.visit.module.named_buffers())) if self.has_buffers else {}

    def left(self, operators: list[Operator], args: Any, kwargs: Any, result: Any) -> None:
        """The call is over, and has returned this."""
        visit, module = self.visit, self.visit.module
        visit.stop = len(operators)
        visit.others = self.others if self.others is not None and self.others.moved() else None
        visit.results, visit.returned = pytree.tree_flatten(result)
        for node in {leaf.grad_fn for leaf in visit.results if isinstance(leaf, Tensor) and leaf.grad_fn}:
            node.register_prehook(visit.differentiates)
        visit.out_keys = keys_of(visit.results)
        now, structure = pytree.tree_flatten((args, kwargs))
        given = visit.arguments
        visit.writes = (
            structure != visit.structure or numbers_in(given) != visit.numbers or len(now) != len(given)
        )
        before, after = self.buffers, self._buffers()
        ran = operators[visit.start :]
        wrote = {key for operator in ran for key in operator.wrote}
        read = {key for operator in ran for key in operator.read} if self.plain else set()
        visit.plain = tuple(name for name, (_, storage) in self.plain.items() if storage in read)
        there = plain_tensors(module) if visit.plain else {}
        visit.replaces = tuple(
            name
            for name in visit.plain
            if there.get(name) != self.plain[name] or self.plain[name][1] in wrote
        )
        visit.changes = _with_siblings(
            module, [name for name in after if after[name] != before.get(name) or after[name][1] in wrote]
        )


class Watch(TorchDispatchMode):
    """Notes every call of a module and every operator of a forward.

    Args:
        call: runs an operator on its arguments.
        others: whether to look who draws from Python's and NumPy's generators, which takes a while.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], others: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call, self.others, self.sparse = call, others, False
        self.operators: list[Operator] = []
        self.root = Visit("", model, [], pytree.tree_structure(None))
        self._open = [self.root]
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = self._watched(path, module, module.forward)

    def _watched(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        within = list(module.modules())

        def watched(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():  # `Functions` is about the model's own
                visit = Visit(path, module, *pytree.tree_flatten((args, kwargs)), len(self.operators))
                found = _Found(visit, any(m._buffers for m in within), self.others)
            self._open[-1].children.append(visit)
            self._open.append(visit)
            visit.hooked = has_saving_hooks()
            result = forward(*args, **kwargs)
            self._open.pop()
            with torch._C.DisableTorchFunction():
                found.left(self.operators, args, kwargs, result)
            return result

        return watched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self.call(func, args, kwargs)
        backward = backward_pass()[0] >= 0
        if backward:
            for visit in self._open[1:]:
                visit.differentiated = True
        leaves = list(operands(args, kwargs))
        if id(func) in _SPARSE and args[0].requires_grad and given_as(func, args, kwargs, "sparse", False):
            self.sparse = True
        about = about_operator(func, leaves)
        draws = draws_numbers(func, args, kwargs)
        given = [(storage_key(leaf), leaf.requires_grad) for leaf in leaves if isinstance(leaf, Tensor)]
        read = frozenset([storage for storage, _ in given])
        wanted = frozenset([storage for storage, wants in given if wants and not backward])
        wrote = frozenset(map(storage_key, written(func, args, kwargs)))
        made = frozenset([storage_key(t) for t in operands((out,), None) if isinstance(t, Tensor)]) - read
        self.operators.append(Operator(about, draws, read, wanted, wrote, made))
        return out


def draws_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers: attention with dropout does, without it does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    return bool(given_as(func, args, kwargs, "dropout_p", True))


def operands(args: Sequence[Any], kwargs: dict[str, Any] | None) -> Iterator[Any]:
    """What an operator is called with, one by one: some come in lists."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, list | tuple):
            yield from operands(value, None)
        else:
            yield value


def about_operator(func: Any, leaves: Sequence[Any]) -> str:
    """An operator and the layouts and values of the operands that it is called with."""
    try:
        key = id(func), *map(_key, leaves)
        if key not in _texts:
            _texts[key] = func, _text(func, leaves)
        return _texts[key][1]
    except TypeError:  # something among them has no hash
        return _text(func, leaves)


# As layers are alike, few are made. By the operators' ids, whose hashes are worked out in Python.
_texts: dict[tuple[Any, ...], tuple[Any, str]] = {}


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return type(leaf), leaf  # 1, 1.0 and True are equal


def _text(func: Any, leaves: Sequence[Any]) -> str:
    return f"{func} {[str(Layout.of(t)) if isinstance(t, Tensor) else repr(t)[:80] for t in leaves]}"


def _with_siblings(module: nn.Module, names: list[str]) -> tuple[str, ...]:
    """All buffers of the layers that have written into one."""
    if not names:
        return ()
    layers = {name.rpartition(".")[0] for name in names}
    return tuple(name for name, _ in module.named_buffers() if name.rpartition(".")[0] in layers)
