"""What waits in host memory: when it leaves and when it is back.

`planner.schedules.waiting` says it for inference and `planner.schedules.offload` for training; this does it.
In training, what a part lets wait begins to leave when its forward has ended, and is gone when the next has
ended. It begins to come back when backward comes to the next part, and is there when that comes to its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import Tensor, UntypedStorage

from evoplan.model.running.chain import State
from evoplan.model.running.internals import storage_key
from evoplan.model.running.strategy import Record
from evoplan.planner.execution.host import Host, Waiting
from evoplan.planner.schedules.schedule import RECORD, Sequence


class StateAway:
    """State of an inference that lies in host memory while steps run that don't read it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._away: dict[str, list[Waiting]] = {}

    def move(self, state: State, put: Iterable[str], take: Iterable[str]) -> None:
        """Have some tensors of the state leave, then some come back."""
        for name in put:
            self._away[name] = self._host.leave([state[name].untyped_storage()])
            self._host.gone(self._away[name])
        for name in take:
            waiting = self._away.pop(name)
            self._host.back(waiting)
            self._host.there(waiting)


class Departures:
    """Of one forward and its backward.

    Args:
        schedule: whose parts let something wait.
    """

    def __init__(self, schedule: Sequence, host: Host) -> None:
        self._parts, self._host = schedule.parts, host
        self._part_of = list(chain.from_iterable([n] * len(part.span) for n, part in enumerate(self._parts)))
        self._state: dict[int, UntypedStorage] = {}  # of the part at work, what is to wait, by `storage_key`
        self._leaving: list[Waiting] = []  # what the part before lets wait
        self._away: dict[int, list[Waiting]] = {}  # by part
        self._coming: dict[int, list[Waiting]] = {}

    def enter(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Forward comes to a step."""
        part = self._parts[self._part_of[step]]
        if step == part.span.start:
            tensors = [state[name] for name in part.wait if name != RECORD]
            self._state = {storage_key(tensor): tensor.untyped_storage() for tensor in tensors}

    def leave(self, step: int, record: Record | None) -> None:
        """Forward has left a step, of which there is a record or none."""
        number = self._part_of[step]
        part = self._parts[number]
        if step != part.span.stop - 1:
            return
        self._host.gone(self._leaving)
        own = record.storages() if RECORD in part.wait and record is not None else []
        self._leaving = self._host.leave([*self._state.values(), *own])
        self._state = {}
        if self._leaving:
            self._away[number] = self._leaving

    def before(self, step: int) -> None:
        """Backward comes to a step."""
        number = self._part_of[step]
        # Backward may have come past parts on which nothing hung.
        for late in [n for n in self._away if n >= number]:
            self._back(late)
        for coming in [n for n in self._coming if n >= number]:
            self._host.there(self._coming.pop(coming))
        if number - 1 in self._away:
            self._back(number - 1)

    def _back(self, number: int) -> None:
        waiting = self._away.pop(number)
        self._host.back(waiting)
        self._coming[number] = waiting
