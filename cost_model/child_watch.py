"""A block's forward without data, watched: each call of a module in it, and what it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.cost_model.trace import Trace
from evoplan.model.foreign.children import Child, layouts_of
from evoplan.model.foreign.noise import Draw, draw_of
from evoplan.model.foreign.watching import about_operator, draws_numbers, operands
from evoplan.model.foreign.writes import written
from evoplan.model.running.context import autocast_dtype
from evoplan.model.running.internals import storage_key
from evoplan.model.running.random_state import OtherState
from evoplan.model.running.unchanged import marks


@dataclass
class _Frame:
    """A call that has not returned yet.

    Attributes:
        known: storages that it may read: its arguments, parameters, buffers, and what was made in it.
        made, read, wrote: what was made in it, and what it has read and written into.
    """

    path: str
    base: int
    begun: float
    known: set[int]
    made: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    wrote: set[int] = field(default_factory=set)
    peak: int = 0
    draws: list[Draw | None] = field(default_factory=list)
    reads_more: bool = False
    work: Any = field(default_factory=hashlib.sha256)


class ChildWatch(TorchDispatchMode):
    """Notes calls of modules and what each takes.

    Args:
        block: without data; its modules' forwards are written over.
        clock: predicted seconds of what has run so far.
        others: whether something in it draws from Python's or NumPy's generators.
    """

    def __init__(
        self, block: nn.Module, trace: Trace, clock: Callable[[], float], others: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others = others
        self.trace, self.clock = trace, clock
        self.found: dict[str, Child] = {}
        self.wants_more = False  # a gradient of something that the block is not given
        self._open: list[_Frame] = []
        self._own = {storage_key(tensor) for tensor in (*block.parameters(), *block.buffers())}
        # Who was given a storage, and who was given one that was written into afterwards.
        self._given: dict[int, set[str]] = {}
        self.rewritten: set[str] = set()
        # Who has made a storage, has not returned it, and runs no longer: it was left in an attribute, say.
        self._left: dict[int, set[str]] = {}
        for path, module in block.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = self._watched(path, module, module.forward)

    def _watched(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(path, module, forward, args, kwargs)

    def run(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """A call of a module."""
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        own = [*module.parameters(), *module.buffers()]
        before, wanted = marks(dict(module.named_buffers())), tuple(map(_wants, leaves))
        # torch.func.functional_call may have given it others, which it will not have when it runs again.
        known = {storage_key(tensor) for tensor in own} & self._own
        known |= {storage_key(tensor) for tensor in given}
        frame = _Frame(path, self.trace.live_bytes, self.clock(), known)
        place = len(self.found)
        self._open.append(frame)
        for tensor in given:
            self._given.setdefault(storage_key(tensor), set()).add(path)
        others = OtherState() if self.others else None
        result = forward(*args, **kwargs)
        if others is not None and others.moved():
            frame.draws.append(None)
        self._open.pop()
        now, structure_now = pytree.tree_flatten((args, dict(kwargs)))
        if structure_now != structure or list(map(id, now)) != list(map(id, leaves)):
            self.rewritten.add(path)  # its caller's lists or dictionaries
        returned, structure_returned = pytree.tree_flatten(result)
        made = [leaf for leaf in returned if isinstance(leaf, Tensor)]
        apart = {storage_key(tensor) for tensor in made}
        for key in apart:
            self.rewritten |= self._left.get(key, set())
        for key in frame.made - apart:
            self._left.setdefault(key, set()).add(path)
        after = marks(dict(module.named_buffers()))
        changes = after != before or any(storage in frame.wrote for _, storage in after.values())
        alone = len(apart) == len(made) > 0 and apart.isdisjoint(map(storage_key, (*given, *own)))
        made_bytes = sum(tensor.untyped_storage().nbytes() for tensor in made)
        child = Child(
            path=path,
            parent=self._open[-1].path if self._open else "",
            calls=1,
            work=frame.work.hexdigest(),
            structure=structure,
            arguments=layouts_of(leaves),
            wanted=wanted,
            read=tuple(isinstance(leaf, Tensor) and storage_key(leaf) in frame.read for leaf in leaves),
            returned=structure_returned,
            results=layouts_of(returned),
            plain=alone and None not in frame.draws and not (frame.reads_more or changes),
            stays=True,
            draws=tuple(frame.draws),
            changes=changes,
            kept_bytes=max(0, self.trace.live_bytes - frame.base - made_bytes),
            peak_bytes=frame.peak,
            seconds=self.clock() - frame.begun,
            autocast=autocast_dtype(),
        )
        self._note(child, place)
        return result

    def _note(self, child: Child, place: int) -> None:
        """Remember a call, before those that it has made: at that place among the modules found."""
        first = self.found.get(child.path)
        if first is None:
            entries = list(self.found.items())
            self.found = dict([*entries[:place], (child.path, child), *entries[place:]])
            return
        self.found[child.path] = replace(
            first,
            calls=first.calls + 1,
            plain=False,
            draws=first.draws + child.draws,
            changes=first.changes or child.changes,
            kept_bytes=first.kept_bytes + child.kept_bytes,
            seconds=first.seconds + child.seconds,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        read = [storage_key(t) for t in given]
        known = self._open[0].known
        self.wants_more |= any(t.requires_grad and storage_key(t) not in known for t in given)
        made = [storage_key(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        wrote = [storage_key(tensor) for tensor in written(func, args, kwargs or {})]
        for key in wrote:
            self.rewritten |= self._given.get(key, set())
        for key in read:
            self.rewritten |= self._left.get(key, set())
        new = set(made).difference(read)
        for key in new:  # where an old one may have been
            self._given.pop(key, None)
            self._left.pop(key, None)
        draws = []
        if draws_numbers(func, args, kwargs or {}):
            draws.append(draw_of(func, args, kwargs or {}, out))
        live, told = self.trace.live_bytes, about_operator(func, [*operands(args, kwargs)]).encode()
        for frame in self._open:
            frame.work.update(told)
            more = set(read) - frame.known
            frame.reads_more |= bool(more)
            # Handed over in an attribute, say, where it will be another when this runs again.
            if more & self._open[0].known - self._own:
                self.rewritten.add(frame.path)
            frame.known.update(made)
            frame.made.update(new)
            frame.read.update(read)
            frame.wrote.update(wrote)
            frame.peak = max(frame.peak, live - frame.base)
            frame.draws += draws
        return out


def _wants(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
