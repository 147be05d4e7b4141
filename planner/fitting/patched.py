"""A model under a plan: its own forward in charge, each planned block's put on a tape."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from evoplan.cost_model.calls import liveness_of
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.inside import Forward
from evoplan.model.foreign.leaves import ChangedCallError, numbers_of
from evoplan.model.running.chain import State
from evoplan.model.running.internals import (
    has_saving_hooks,
    other_forwards,
    parametrization_cache,
    transformed,
)
from evoplan.planner.execution.tape import Tape
from evoplan.planner.fitting.met import Planned
from evoplan.planner.fitting.runs import CallRuns
from evoplan.planner.schedules.schedule import Action, Sequence, actions

OnChange = Literal["error", "unplanned"]
MakeRuns = Callable[[dict[str, Planned]], CallRuns]


class Patched:
    """The patches on a model: forwards of its blocks and its own, on the instances.

    Args:
        on_change: where a block is called otherwise than planned: raise, or run the rest as it is written.
        runs: makes what runs the calls of one forward.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        schedule: Sequence,
        on_change: OnChange = "error",
        runs: MakeRuns = CallRuns,
    ) -> None:
        self.model, self.captured, self.schedule, self.on_change = model, captured, schedule, on_change
        self.make_runs, self.liveness = runs, liveness_of(captured)
        self.todo = tuple(actions(schedule))
        self.blocks: dict[str, Planned] = {}  # by path, whatever lies there later
        self._local = threading.local()  # a forward of another thread is another's
        self._installed, self._lock = ExitStack(), threading.RLock()

    @property
    def current(self) -> _Pass | None:
        """The forward that this thread is in."""
        return getattr(self._local, "current", None)

    @current.setter
    def current(self, value: _Pass | None) -> None:
        self._local.current = value

    def install(self) -> None:
        """Put the patches on.

        Raises:
            CaptureError: there are others.
        """
        if any(isinstance(module.__dict__.get("forward"), _Forward) for module in self.model.modules()):
            raise CaptureError("the model is under a plan already; `remove()` that first, or `replan()` it")
        forwards: dict[nn.Module, Forward] = {}
        for path in dict.fromkeys(call.path for call in self.captured.calls):
            block = self.model.get_submodule(path)
            self.blocks[path] = Planned(block, block.forward, self._lock)
            forwards[block] = _BlockForward(self, block, block.forward)
        forwards[self.model] = _ModelForward(self, self.model, self.model.forward)
        self._installed.enter_context(other_forwards(forwards))

    def remove(self) -> None:
        """Take them off."""
        with self._lock:  # what runs in another thread has patches within blocks
            self._installed.close()


class _Forward:
    """A forward in place of a module's own; copies and pickles of the module have its own again."""

    def __init__(self, patched: Patched, module: nn.Module, forward: Forward) -> None:
        self.patched, self.module, self.forward = patched, module, forward
        self.__wrapped__ = forward  # whoever asks for its signature gets the module's own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.forward, memo)  # a method's module is the copy then

    def __reduce__(self) -> Any:
        return _itself, (self.forward,)


def _itself(forward: Forward) -> Forward:
    return forward


class _ModelForward(_Forward):
    """The model's: a pass begins and ends."""

    # A compiled model around it breaks its graph here, and nowhere else.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patched = self.patched
        if patched.current is not None or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        patched.current = _Pass(patched)
        try:
            result = self.forward(*args, **kwargs)
            patched.current.end()
            return result
        finally:
            patched.current = None


class _BlockForward(_Forward):
    """A block's: a step of the pass, if there is one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = self.patched.current
        if current is None or current.off or current.busy or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return current.step(self.module, self.forward, args, kwargs)


class _Pass:
    """One forward of the model under its plan."""

    def __init__(self, patched: Patched) -> None:
        self.patched, self.calls = patched, patched.captured.calls
        self.runs = patched.make_runs(patched.blocks)
        self.tape = Tape(self.calls, patched.liveness, self.runs)
        self.state: State = {}
        self.position = 0
        self.busy = self.off = False

    def step(self, block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call that is next, if it is this one."""
        try:
            if has_saving_hooks():
                raise ChangedCallError(
                    f"a checkpoint or other saved-tensor hooks lie around {type(block).__name__}"
                )
            if by := transformed():
                raise ChangedCallError(
                    f"the model runs under {by}, and a plan is for forward and backward: `remove()` it"
                )
            call = self._next(block)
            latest = {name: numbers_of(self.state[name]) for name in call.reads if name in self.state}
            leaves = self.runs.accepted(call, args, kwargs, latest)
            self._check_parametrizations(call, block)
        except ChangedCallError as error:
            self._changed(error)
            return forward(*args, **kwargs)
        self.position += 1
        action, tape = self.patched.todo[call.index], self.tape
        if self.runs.as_written(action):
            return self._written(call, action, args, kwargs, leaves)
        tape.enter(action, self.state)
        self.busy = True
        try:
            inputs = self.runs.meet(call, leaves)
            made = tape.advance(call, action, {name: self.state[name] for name in call.reads}, inputs)
        except ChangedCallError as error:  # it has returned something else
            self.position = call.index
            self._changed(error)
            self.runs.undo(call)
            return forward(*args, **kwargs)
        finally:
            self.busy = False
        self._made(call, made)
        tape.leave(action)
        met = self.runs.met[call.index]
        returned, met.returned = met.returned, []
        return call.result_of(made, returned, leaves)

    def _written(
        self, call: Call, action: Action, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Any:
        """A call that autograd records as it does without a plan."""
        assert action.run is not None
        self.busy = True
        try:
            result = self.runs.written(call, action.run.strategy, args, kwargs, leaves)
        finally:
            self.busy = False
        try:
            made, returned = call.made_of(result)
            call.check_passed(returned, made, leaves)
            self._made(call, made)
        except ChangedCallError as error:
            self._changed(error)
        return result

    def _check_parametrizations(self, call: Call, block: nn.Module) -> None:
        """What runs again makes weights anew, which is right unless that is seen."""
        action = self.patched.todo[call.index]
        stays = self.runs.as_written(action) and action.run is not None and not action.run.strategy.modules
        cached = bool(call.changes) and parametrization_cache() and not stays
        if cached and any(map(is_parametrized, block.modules())):
            raise ChangedCallError(
                f"{call.name} has parametrizations that change buffers (spectral_norm), and is called under "
                "parametrize.cached(), which has them do so once: leave that out"
            )

    def _made(self, call: Call, made: tuple[Tensor, ...]) -> None:
        """The state after a call."""
        self.state.update(zip(call.makes, made, strict=True))
        for name in self.patched.liveness.last_reads(call.index):
            del self.state[name]

    def _next(self, block: nn.Module) -> Call:
        if self.position < len(self.calls):
            call = self.calls[self.position]
            if self.patched.blocks[call.path].module is block:
                return call
            raise ChangedCallError(
                f"another block ({type(block).__name__}) is called than {call.name}, as planned"
            )
        raise ChangedCallError("more blocks are called than when the plan was made")

    def end(self) -> None:
        """The model's forward is over."""
        if not self.off and self.position < len(self.calls):
            self._changed(ChangedCallError(f"{self.calls[self.position].name} was not called"))

    def _changed(self, error: ChangedCallError) -> None:
        if self.patched.on_change == "error":
            raise ChangedCallError(
                f"{error}; fit the model again for what it is given now, or with on_change='unplanned'"
            ) from None
        self.tape.stop_before(self.position)
        self.off = True
