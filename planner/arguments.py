"""Arguments of what users call, looked at before the work: one line that says what to give."""

from __future__ import annotations

from typing import Any, get_args


def check_choices(**given: tuple[Any, Any]) -> None:
    """ValueError where a value is none of its Literal's; by name, both."""
    for name, (value, kinds) in given.items():
        if value not in get_args(kinds):
            raise ValueError(f"{name} is {value!r:.60}; choose {' or '.join(get_args(kinds))}")


def check_kinds(**given: tuple[Any, Any, str]) -> None:
    """ValueError where a value is of another class; by name, the value, its classes and what to give."""
    for name, (value, classes, give) in given.items():
        if not isinstance(value, classes):
            raise ValueError(f"{name} is of class {type(value).__name__}; give {give}")
