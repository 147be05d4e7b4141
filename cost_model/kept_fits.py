"""What was found of a model that somebody else wrote, kept on disk.

It follows from the model's own sources as well, and from those of all that they import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from evoplan.cost_model.kept import Store, key_of, surroundings
from evoplan.cost_model.kept_traces import cost_from_text, cost_to_text
from evoplan.cost_model.steps import StepCost
from evoplan.model.foreign.children import Axis, Declared
from evoplan.model.foreign.sources import sources_of

T = TypeVar("T")


class KeptFits:
    """What was found of a model, by all that it follows from.

    Args:
        model: its classes' sources, and those of `others`, classes and functions that have a part in what is
            found, are in every key. Where one has none, as in a notebook, nothing is kept.
        about: what else all depends on.
    """

    def __init__(self, model: nn.Module, others: Sequence[Any] = (), about: Sequence[Any] = ()) -> None:
        self._store = Store()
        sources = sources_of([*{type(module) for module in model.modules()}, *others])
        self._about = None if sources is None else (surroundings(), sources, *about)

    def recall(
        self, about: Sequence[Any], find: Callable[[], T], text_of: Callable[[T], str], of: Callable[[str], T]
    ) -> T:
        """What is kept under a key; else what `find` finds, which is kept from then on.

        Args:
            about: what it follows from; None in it: from something that cannot be told.
            text_of, of: as it is written, and read again.
        """
        if self._about is None or None in about or self._store.path is None:
            return find()
        key = key_of((self._about, *about))
        try:
            return of(self._store.read(key)[_NAME])
        except (KeyError, ValueError, TypeError):
            found = find()
            self._store.write(key, {_NAME: text_of(found)})
            return found


_NAME = "found"


def axes_to_text(axes: Sequence[Axis]) -> str:
    """As JSON."""
    return json.dumps([(axis.dim, axis.arguments, axis.results, axis.length) for axis in axes])


def axes_from_text(text: str) -> tuple[Axis, ...]:
    """The inverse."""
    return tuple(Axis(dim, tuple(given), tuple(made), n) for dim, given, made, n in json.loads(text))


def declared_to_text(declared: Declared | None) -> str:
    """As JSON."""
    return json.dumps(None if declared is None else [dict(declared.axes), declared.attends])


def declared_from_text(text: str) -> Declared | None:
    """The inverse."""
    found = json.loads(text)
    return None if found is None else Declared(*found)


def costs_to_text(costs: Sequence[StepCost]) -> str:
    """Those of a block, as JSON, without times."""
    return json.dumps([(str(cost.strategy), cost_to_text(cost)) for cost in costs])


def costs_from_text(text: str) -> list[StepCost]:
    """The inverse."""
    return [cost_from_text(strategy, cost) for strategy, cost in json.loads(text)]
