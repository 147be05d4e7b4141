"""Where torch's generators stand, for a layer that draws from them and runs again."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class ImaginedState:
    """As `RandomState`, for code that runs without data: takes as much memory, and does nothing."""

    def __init__(self, where: torch.device | str = "cpu") -> None:
        self._state = torch.empty(STATE_BYTES, dtype=torch.uint8, device=where)
        self._before: list[Tensor] = []

    def __enter__(self) -> ImaginedState:
        self._before.append(torch.empty_like(self._state))
        return self

    def __exit__(self, *error: object) -> None:
        self._before.pop()


class Draws(TorchDispatchMode):
    """Whether anything inside draws random numbers, as the operators themselves say."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any = self.any or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


STATE_BYTES = torch.get_rng_state().nbytes  # of the CPU's generator


def _read() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_devices]


def _write(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
