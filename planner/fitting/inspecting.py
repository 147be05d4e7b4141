"""What `evoplan.fit` finds in a model, before anything is planned."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evoplan.cost_model.knobs import tried_knobs
from evoplan.model.foreign.calls import Call, Constant, FromState
from evoplan.model.foreign.children import SELF, Child
from evoplan.model.foreign.knobs import Knobs, declared
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.fitting.given import check_call
from evoplan.planner.fitting.problem import Fitting, autocast_in_force, fitting_of
from evoplan.planner.fitting.simulating import Loss, mean_of_squares
from evoplan.planner.fitting.solving import least_fit
from evoplan.planner.problems.problem import Optimizer
from evoplan.planner.schedules.replay import replay
from evoplan.planner.sizes import exact_size, format_size
from evoplan.planner.solvers import BASELINES

MATTERS = 0.05  # of a block's peak: modules that take less need not be run otherwise


@dataclass(frozen=True)
class Found:
    """One call of a block.

    Attributes:
        name: its path in the model, with a number for the second call on.
        module: its class.
        parameters: how many numbers they are.
        given, makes: its tensors, as `float32 [2, 5, 16]`; those of earlier blocks by name.
        kept_bytes: what autograd keeps of it from forward to backward.
        strategies: how it can be run.
        axes: of the block (`.`) and of modules in it, by path: the dimensions of what each makes along which
            it does the same for each part, and how long they are. Modules of little memory are left out.
        knobs: values of its own knobs that were tried, such as `chunk_size=4`, and why not; "" where results
            are equal.
    """

    name: str
    module: str
    parameters: int
    given: tuple[str, ...]
    makes: tuple[str, ...]
    kept_bytes: int
    strategies: tuple[str, ...]
    axes: dict[str, dict[int, int]]
    knobs: dict[str, str]

    def report(self, name: str) -> list[str]:
        """In words, under a name."""
        axes = "; ".join(
            f"{path} along {', '.join(f'{dim} ({length})' for dim, length in found.items())}"
            for path, found in self.axes.items()
        )
        return [
            f"  {name}: {self.module}, {self.parameters:,} parameters, "
            f"keeps {format_size(self.kept_bytes)} each",
            f"    given {', '.join(self.given) or 'no tensors'}; makes {', '.join(self.makes)}",
            f"    can run {', '.join(self._plain)}; of its modules recomputed {self._ways('redo')}; "
            f"in slices {self._ways('chunk')}",
            f"    independent {axes or 'nowhere'}",
            *(f"    knob {said}: {why or 'equal results'}" for said, why in self.knobs.items()),
        ]

    @property
    def _plain(self) -> list[str]:
        return [strategy for strategy in self.strategies if "[" not in strategy]

    def _ways(self, how: str) -> str:
        """Modules that some strategy runs so."""
        within = [pair for strategy in self.strategies for pair in Strategy.parse(strategy).within]
        return ", ".join(dict.fromkeys(path for path, way in within if way.startswith(how))) or "none"


@dataclass(frozen=True)
class Inspection:
    """The blocks of a model and what a step takes.

    Attributes:
        static_bytes: parameters, gradients, optimizer, inputs.
        notes: what is left as it is written, and why.
        peak_bytes: of a step with nothing recomputed, and `peak_at` where that is.
        least_bytes: the least that a plan needs.
    """

    model: str
    blocks: tuple[Found, ...]
    static_bytes: int
    peak_bytes: int
    peak_at: str
    least_bytes: int
    notes: tuple[str, ...]

    @property
    def knobs(self) -> dict[str, list[Any]]:
        """Those of its blocks, as `evoplan.fit` takes them: values that give equal results in each."""
        tried: dict[str, set[bool]] = {}
        for said, why in (pair for block in self.blocks for pair in block.knobs.items()):
            tried.setdefault(said, set()).add(not why)
        found: dict[str, list[Any]] = {}
        for name, _, text in (said.partition("=") for said, equal in tried.items() if equal == {True}):
            found.setdefault(name, []).append(literal_eval(text))
        return found

    def report(self) -> str:
        """In words: equal neighbours once."""
        lines = [f"{self.model}: {len(self.blocks)} blocks"]
        at = 0
        while at < len(self.blocks):
            block, stop = self.blocks[at], at + 1
            while stop < len(self.blocks) and _alike(block, self.blocks[stop]):
                stop += 1
            name = block.name if stop == at + 1 else f"{block.name} to {self.blocks[stop - 1].name}"
            lines += block.report(name)
            at = stop
        lines += [
            f"static    {exact_size(self.static_bytes)}: parameters, gradients, optimizer, inputs",
            f"unplanned {exact_size(self.peak_bytes)}, at the {self.peak_at}",
            f"least     {exact_size(self.least_bytes)}",
            *(f"note      {note}" for note in self.notes),
            *([f"knobs     evoplan.fit(..., knobs={self.knobs}) has them turned"] if self.knobs else []),
        ]
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    *,
    optimizer: Optimizer = "adamw",
    device: str | None = None,
    autocast: torch.dtype | None = None,
    knobs: Knobs | None = None,
) -> Inspection:
    """The blocks that `fit` would plan, what they are given and keep, the peak of a step and where it is.

    Args:
        model: any module whose blocks are called one after the other; it is left as it is.
        args, kwargs: what it is called with; only shapes and dtypes count.
        loss: takes the model's output and returns a scalar; the mean of squares if not given.
        optimizer: whose states count: none, sgd (with momentum) or adamw.
        device: to plan for, by its name in the device table or its file; where the model lies if not given.
        autocast: dtype that torch.autocast casts to in forward; what is in force if not given.
        knobs: to try, as `fit` takes them, beside those that are seen: arguments and attributes called like
            `chunk_size`.

    Returns:
        Blocks with their strategies, axes and knobs; static, unplanned and least bytes of a step.

    Raises:
        CaptureError: the model cannot be planned; says why.
    """
    check_call(model, args, kwargs, loss, optimizer, device, autocast, knobs)
    autocast = autocast or autocast_in_force(model)
    about = tuple(args), dict(kwargs or {}), loss or mean_of_squares, optimizer, autocast, device
    fitting = fitting_of(model, *about)
    tried = tried_knobs(model, fitting.captured, declared(knobs), fitting.kept)
    none = BASELINES["none"](fitting.table)
    peak = replay(none, fitting.table).peak
    where = "loss" if peak.step is None else f"{peak.phase} of {fitting.captured.calls[peak.step].name}"
    return Inspection(
        model=type(model).__name__,
        blocks=tuple(_found(fitting, index, said) for index, said in enumerate(tried)),
        static_bytes=sum(fitting.static.values()),
        peak_bytes=fitting.predict(none).peak_bytes,
        peak_at=where,
        least_bytes=least_fit(fitting).predicted.peak_bytes,
        notes=fitting.captured.notes,
    )


def _found(fitting: Fitting, index: int, knobs: dict[str, str]) -> Found:
    call, costs = fitting.captured.calls[index], fitting.table.options[index]
    module = fitting.model.get_submodule(call.path)
    given = [
        f"{argument.name} {argument.layout}" if isinstance(argument, FromState) else str(argument.layout)
        for argument in call.arguments
        if isinstance(argument, FromState | Constant)
    ]
    makes = (f"{name} {made.layout}" for name, made in zip(call.makes, call.made, strict=True))
    whole = next(cost for cost in costs if cost.strategy == WHOLE)
    return Found(
        name=call.name,
        module=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        given=tuple(given),
        makes=tuple(makes),
        kept_bytes=whole.preserved_bytes,
        strategies=tuple(str(cost.strategy) for cost in costs),
        axes={path: axes for path, child in call.children.items() if (axes := _axes(child, call))},
        knobs=knobs,
    )


def _axes(child: Child, call: Call) -> dict[int, int]:
    if child.peak_bytes < MATTERS * call.children[SELF].peak_bytes or child.kept_bytes == 0:
        return {}
    return {axis.dim: axis.length for axis in child.axes}


def _alike(one: Found, other: Found) -> bool:
    return (one.module, one.parameters, one.given, one.makes) == (
        other.module,
        other.parameters,
        other.given,
        other.makes,
    )
