"""Where torch's generators stand, for a layer that draws from them and runs again."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OtherState:
    """Python's and NumPy's default generators as they are now.

    Inside `with` they stand so again, and are put back after.
    """

    def __init__(self) -> None:
        self._state = _others()
        self._before: list[_Others] = []

    def moved(self) -> bool:
        """Whether something has been drawn since."""
        return self._state != _others()

    def reset(self) -> None:
        """Have them stand so from now on."""
        _put_others(self._state)

    def __enter__(self) -> OtherState:
        self._before.append(_others())
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        _put_others(self._before.pop())


class RandomState:
    """The generators as they are now: torch's default ones, Python's and NumPy's.

    Inside `with` they stand so again, and are put back after.
    """

    def __init__(self) -> None:
        self._state, self._others = _read(), OtherState()
        self._before: list[list[Tensor]] = []

    def moved(self) -> bool:
        """Whether something has been drawn since."""
        if any(not torch.equal(then, now) for then, now in zip(self._state, _read(), strict=True)):
            return True
        return self._others.moved()

    def reset(self) -> None:
        """Have the generators stand so from now on."""
        _write(self._state)
        self._others.reset()

    def __enter__(self) -> RandomState:
        self._before.append(_read())
        _write(self._state)
        self._others.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _write(self._before.pop())
        self._others.__exit__()


class ImaginedState:
    """As `RandomState`, for code that runs without data: takes as much memory, and does nothing."""

    def __init__(self, where: torch.device | str = "cpu") -> None:
        self._state = torch.empty(STATE_BYTES, dtype=torch.uint8, device=where)
        self._before: list[Tensor] = []

    def reset(self) -> None:
        """Nothing."""

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


# States of Python's and of NumPy's generator.
_Others = tuple[Any, Any]


def _others() -> _Others:
    kind, numbers, *rest = np.random.get_state(legacy=True)
    assert isinstance(numbers, np.ndarray)
    return random.getstate(), (kind, numbers.tobytes(), *rest)


def _put_others(states: _Others) -> None:
    random.setstate(states[0])
    kind, numbers, *rest = states[1]
    np.random.set_state((kind, np.frombuffer(numbers, np.uint32), *rest))


def _read() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_devices]


def _write(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
