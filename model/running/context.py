"""What code runs under that changes its results: to be in force again wherever parts of a forward run again.

torch.utils.checkpoint brings autocast back, and no more; here all that decides in which precision, by which
algorithm and of which dtype an operator works comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import TracebackType
from typing import Any

import torch

from evoplan.model.running.internals import parametrization_cache, set_parametrization_cache

# How a setting is read and how it is put in force.
Setting = tuple[Callable[[], Any], Callable[[Any], None]]

AUTOCAST_CACHE, PARAMETRIZATION_CACHE = "autocast cache", "parametrization cache"


def _autocast(kind: str) -> Setting:
    def put(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(kind, value[0])
        torch.set_autocast_dtype(kind, value[1])

    return lambda: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)), put


def _attribute(owner: Any, name: str) -> Setting:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@cache
def _settings() -> dict[str, Setting]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {"cpu"} if device is None else {"cpu", device.type}
    backends = torch.backends
    return {
        **{f"autocast on {kind}": _autocast(kind) for kind in sorted(kinds)},
        AUTOCAST_CACHE: (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        PARAMETRIZATION_CACHE: (parametrization_cache, set_parametrization_cache),
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "deterministic algorithms": (
            _deterministic,
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        "cudnn.deterministic": _attribute(backends.cudnn, "deterministic"),
        "cudnn.benchmark": _attribute(backends.cudnn, "benchmark"),
        # The stubs do not know that the module has replaced itself by an object.
        "products on cpu": _attribute(backends.mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined]
        "products on cuda": _attribute(backends.cuda.matmul, "fp32_precision"),
    }


def autocast(kind: str, dtype: str | None, keep_casts: bool = True) -> AbstractContextManager[object]:
    """torch.autocast on that kind of device to a dtype by name; for None nothing at all.

    Args:
        keep_casts: of parameters, until the end of the outermost block (autocast's cache).
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(kind, getattr(torch, dtype), cache_enabled=keep_casts)


def autocast_dtype() -> torch.dtype | None:
    """That of the torch.autocast in force here, on whichever device."""
    kinds = [name.removeprefix("autocast on ") for name in _settings() if name.startswith("autocast on ")]
    return next((torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)), None)


class Context:
    """All settings as they are now; they are in force inside `with`, which may be entered again and again."""

    def __init__(self) -> None:
        self._values = {name: get() for name, (get, _) in _settings().items()}
        self._before: list[dict[str, Any]] = []

    @classmethod
    def of_steps(cls) -> Context:
        """As now, but nothing that is made from a parameter is kept for another use of it.

        autocast keeps casts of parameters until its outermost block ends, `parametrize.cached()` what it
        makes of them. One that was made where nothing is recorded has no gradient, however it is used later.
        """
        context = cls()
        context._values |= {AUTOCAST_CACHE: False, PARAMETRIZATION_CACHE: 0}
        return context

    def __enter__(self) -> Context:
        before = {name: get() for name, (get, _) in _settings().items()}
        self._before.append(before)
        _put(self._values, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _put(self._before.pop(), self._values)


def _put(values: dict[str, Any], present: dict[str, Any]) -> None:
    for name, value in values.items():
        if value != present[name]:
            _settings()[name][1](value)
