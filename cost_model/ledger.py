"""Who holds what at the peak: storages counted by the region of the model that made them.

Works on real tensors and on fake ones alike, so that a prediction and a measurement are split in one way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from evoplan.cost_model.trace import Trace
from evoplan.model.running.regions import open_regions

Regions = tuple[str, ...]  # open ones, the outermost first


class Ledger(Trace):
    """A trace that remembers every storage made since its last reset, and when it came and went."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._events: list[tuple[int, int]] = []  # a storage's number; its bytes, less than 0 when freed
        self._regions: list[Regions] = []  # of each storage, by number
        self._numbers: dict[int, int] = {}  # of those that live, by key

    def reset(self) -> None:
        """Start a phase; what lives now is not remembered."""
        super().reset()
        self._events, self._regions, self._numbers = [], [], {}

    def given(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that were there before."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _track(self, tensor: Tensor) -> bool:
        before = self.live_bytes
        made = super()._track(tensor)
        if made:
            self._numbers[tensor.untyped_storage()._cdata] = len(self._regions)
            self._events.append((len(self._regions), self.live_bytes - before))
            self._regions.append(open_regions())
        return made

    def _freed(self, key: int, size: int) -> None:
        super()._freed(key, size)
        number = self._numbers.pop(key, None)
        if number is not None:
            self._events.append((number, -size))

    def made(self, tensors: Iterable[Tensor]) -> bool:
        """Whether some of these tensors were made since the last reset."""
        return any(tensor.untyped_storage()._cdata in self._numbers for tensor in tensors)

    def at_peak(self, apart: Iterable[Tensor] = ()) -> tuple[Counter[Regions], int]:
        """Bytes by region of what lives when most bytes do, and the bytes of some tensors among it.

        Args:
            apart: tensors that are counted by themselves, not by region.
        """
        live = most = at = 0
        for index, (_, size) in enumerate(self._events):
            live += size
            if live > most:
                most, at = live, index + 1
        held: Counter[int] = Counter()
        for number, size in self._events[:at]:
            held[number] += size
        keys = {tensor.untyped_storage()._cdata for tensor in apart}
        of_apart = sum(held.pop(self._numbers[key], 0) for key in keys if key in self._numbers)
        by_region: Counter[Regions] = Counter()
        for number, size in held.items():
            by_region[self._regions[number]] += size
        return +by_region, of_apart
