"""Knobs of a model's blocks: which of their values give equal results, and so are ways to run them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from evoplan.cost_model.children import signature
from evoplan.cost_model.kept_fits import KeptFits
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.children import SELF
from evoplan.model.foreign.equal_results import combinations, values_in_words, what_differs
from evoplan.model.foreign.independence import about_axes
from evoplan.model.foreign.knobs import Knob, found_on, seen_on
from evoplan.model.foreign.leaves import Value
from evoplan.model.foreign.sources import told

TRIED = (4, 16, 64)  # values of knobs that nobody has named
MOST = 16  # combinations of values: each is traced with all ways to recompute

Refused = dict[str, str]  # why, by the values in words


def with_knobs(
    model: nn.Module, captured: Captured, knobs: Sequence[Knob], kept: KeptFits | None = None
) -> Captured:
    """A chain whose calls know the knobs of their blocks, and the values that give equal results.

    Others are named in its notes.

    Args:
        captured: calls know which modules they call.
        kept: where what was shown before is found.

    Raises:
        CaptureError: no block has a knob of that name, or there are too many combinations.
    """
    if not knobs:
        return captured
    known: dict[tuple[object, ...], tuple[tuple[dict[str, str], ...], Refused]] = {}
    calls, notes, seen = [], dict[str, list[str]](), set[str]()
    for call in captured.calls:
        block = model.get_submodule(call.path)
        own = knobs_of(call, block, knobs)
        seen |= own.keys()
        key = signature(call, block), told(block) or call.path, repr(own)
        if key not in known:
            known[key] = _shown(call, block, own, kept)
        turned, refused = known[key]
        calls.append(replace(call, knobs=own, turned=turned))
        for said, why in refused.items():
            notes.setdefault(f"{said} is not used: {why}", []).append(call.name)
    if missing := [knob.name for knob in knobs if knob.name not in seen]:
        raise CaptureError(
            f"no block takes an argument {missing[0]}, or has a module with such an attribute; "
            f"`evoplan.inspect` tells the knobs that it sees ({captured.calls[0].name} is a block)"
        )
    in_words = (
        f"in {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}, {said}"
        for said, names in notes.items()
    )
    return replace(captured, calls=tuple(calls), notes=(*captured.notes, *in_words))


def tried_knobs(
    model: nn.Module, captured: Captured, knobs: Sequence[Knob], kept: KeptFits | None = None
) -> list[Refused]:
    """For each call the values of its knobs that were tried, one at a time, and why not: "" where equal.

    Args:
        knobs: to try beside those that are seen: arguments and attributes called like `chunk_size`.
    """
    known: dict[tuple[object, ...], Refused] = {}
    found = []
    for call in captured.calls:
        block = model.get_submodule(call.path)
        args, kwargs = _called_with(call)
        sizes = [n for a in call.arguments if not isinstance(a, Value) for n in a.layout.shape]
        values = tuple(value for value in TRIED if value < max(sizes, default=0))
        named = {knob.name for knob in knobs}
        seen = [Knob(name, values) for name in seen_on(block, args, kwargs) if values and name not in named]
        own = knobs_of(call, block, [*knobs, *seen])
        key = signature(call, block), told(block) or call.path, repr(own)
        if key not in known:
            alone = [values for knob in own.values() for values in combinations([knob])]
            known[key] = {
                values_in_words(values): equal_or_why(call, block, own, values, kept) or ""
                for values in alone
            }
        found.append(known[key])
    return found


def knobs_of(call: Call, block: nn.Module, knobs: Sequence[Knob]) -> dict[str, Knob]:
    """Those that a block has, by name."""
    args, kwargs = _called_with(call)
    return {knob.name: found for knob in knobs if (found := found_on(block, knob, args, kwargs))}


def _called_with(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Without tensors: a layout is in the place of each."""
    return call.arguments_from([a.value if isinstance(a, Value) else a.layout for a in call.arguments])


def about_knobs(call: Call) -> str | None:
    """What costs follow from; None where a setter, whose code is not known, has a part in them."""
    if any(call.knobs[name].about is None for values in call.turned for name in values):
        return None
    return repr([(name, knob.about, knob.default) for name, knob in call.knobs.items()] + [*call.turned])


def _shown(
    call: Call, block: nn.Module, knobs: Mapping[str, Knob], kept: KeptFits | None
) -> tuple[tuple[dict[str, str], ...], Refused]:
    settings = combinations([*knobs.values()])
    if len(settings) > MOST:
        raise CaptureError(f"the knobs have {len(settings)} combinations; give at most {MOST}")
    turned, refused = [], Refused()
    for values in settings:
        why = equal_or_why(call, block, knobs, values, kept)
        if why is None:
            turned.append(values)
        else:
            refused[values_in_words(values)] = why
    return tuple(turned), refused


def equal_or_why(
    call: Call,
    block: nn.Module,
    knobs: Mapping[str, Knob],
    values: Mapping[str, str],
    kept: KeptFits | None = None,
) -> str | None:
    """None where a block gives equal results with these values; else why not."""
    child = call.children[SELF]
    show = partial(what_differs, block, child, knobs, values)
    about = [knobs[name].about for name in values]
    if kept is None or None in about:
        return show()
    key = "knobs", told(block), about_axes(block, child), repr((about, values))
    why: str | None = kept.recall(key, show, json.dumps, _reason)
    return why


def _reason(text: str) -> str | None:
    why = json.loads(text)
    return None if why is None else str(why)
