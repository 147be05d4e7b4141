"""Where torch's generators stand, for a layer that draws from them and runs again."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor


class RandomState:
    """The default generators as they are now; inside `with` they stand so again, and are put back after."""

    def __init__(self) -> None:
        self._state = _read()
        self._before: list[list[Tensor]] = []

    def moved(self) -> bool:
        """Whether something has been drawn since."""
        return any(not torch.equal(then, now) for then, now in zip(self._state, _read(), strict=True))

    def __enter__(self) -> RandomState:
        self._before.append(_read())
        _write(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _write(self._before.pop())


def _read() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_devices]


def _write(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
