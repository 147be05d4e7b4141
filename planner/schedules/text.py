"""Schedules as JSON: nested lists, as plan files have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence

LONGEST_STRATEGY = 2000  # characters


def schedule_to_json(schedule: Sequence) -> list[Any]:
    """Parts in order: [step, "strategy"], or {"checkpoint": parts, "discard": ["strategy", ...]}.

    A step with state in host memory has a third element, the tensors' names: [3, "whole", ["z"]]. A part of
    which something waits there until backward is {"wait": ["m", "record"], "part": it without}.
    """
    return [_part_to_json(part) for part in schedule.parts]


def _part_to_json(part: Run | Checkpoint) -> Any:
    if part.wait:
        return {"wait": list(part.wait), "part": _part_to_json(replace(part, wait=()))}
    if isinstance(part, Run):
        return [part.step, str(part.strategy), *([list(part.away)] if part.away else [])]
    return {"checkpoint": schedule_to_json(part.body), "discard": [str(s) for s in part.discard]}


def schedule_from_json(parts: list[Any]) -> Sequence:
    """The inverse of `schedule_to_json`; ValueError says what is wrong."""
    return Sequence(tuple(map(_part_from_json, parts)))


def _part_from_json(part: Any) -> Run | Checkpoint:
    match part:
        case [bool(), *_]:
            pass
        case [int(step), str(strategy)]:
            return Run(step, _strategy(strategy))
        case [int(step), str(strategy), [*away]] if away and all(isinstance(n, str) for n in away):
            return Run(step, _strategy(strategy), tuple(away))
        case {"checkpoint": list(body), "discard": list(discard)}:
            return Checkpoint(schedule_from_json(body), tuple(map(_strategy, discard)))
        case {"wait": [*wait], "part": inner} if wait and all(isinstance(name, str) for name in wait):
            if not (isinstance(inner, dict) and "wait" in inner):
                return replace(_part_from_json(inner), wait=tuple(wait))
    raise ValueError(f"{short(part)} is no part of a schedule")


def _strategy(text: Any) -> Strategy:
    if not isinstance(text, str) or len(text) > LONGEST_STRATEGY:
        raise ValueError(f"{short(text)} is no strategy")
    return Strategy.parse(text)


def schedule_of(value: Any) -> Sequence:
    """A schedule, or what a file has of one."""
    if isinstance(value, Sequence):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{short(value)} is no list of parts")
    return schedule_from_json(value)


def short(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
