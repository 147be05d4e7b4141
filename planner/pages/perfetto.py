"""A predicted step as a trace that Perfetto and chrome://tracing open: the Trace Event Format, JSON.

Times are microseconds. Runs of steps are slices, a track for each phase; memory is two counters.
"""

from __future__ import annotations

from typing import Any

from evoplan.planner.pages.account import Account
from evoplan.planner.pages.timing import LAYERS, layers_of, starts_of

PID = 1


def perfetto(account: Account) -> dict[str, Any]:
    """The trace: `traceEvents`, and what it is of in `otherData`.

    The counter `memory` stacks all that is live, by kind. `activations` is what is live above all that
    predictions count as static, the outputs included; its largest value is the plan's `activation_bytes`.
    """
    phases = list(dict.fromkeys(str(moment.phase) for moment in account.moments))
    return {
        "traceEvents": [*_names(account, phases), *_slices(account, phases), *_counters(account)],
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": account.title,
            "predicted": "by evoplan; nothing here is measured",
            "peak_bytes": account.peak_bytes,
            "static_bytes": account.fixed_bytes + account.output_bytes,
        },
    }


def _names(account: Account, phases: list[str]) -> list[dict[str, Any]]:
    """Metadata: what the process and the tracks are called, and their order."""
    found = [_meta("process_name", 0, {"name": f"{account.title} (predicted)"})]
    for track, phase in enumerate(phases, start=1):
        found.append(_meta("thread_name", track, {"name": phase}))
        found.append(_meta("thread_sort_index", track, {"sort_index": track}))
    return found


def _meta(name: str, track: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": PID, "tid": track, "ts": 0, "args": arguments}


def _slices(account: Account, phases: list[str]) -> list[dict[str, Any]]:
    found = []
    starts = starts_of(account)
    for at, (moment, run) in enumerate(zip(account.moments, account.holdings.passes, strict=True)):
        about: dict[str, Any] = {"moment": at + 1, "live_bytes": account.fixed_bytes + moment.peak_bytes}
        if run is not None:
            about |= {"strategy": str(run.strategy), "checkpoints": run.level}
        found.append(
            {"ph": "X", "name": account.where(moment), "cat": moment.phase, "pid": PID,
             "tid": 1 + phases.index(moment.phase), "ts": _micros(starts[at]),
             "dur": _micros(starts[at + 1]) - _micros(starts[at]), "args": about}
        )  # fmt: skip
    return found


def _counters(account: Account) -> list[dict[str, Any]]:
    found = []
    starts = starts_of(account)
    for at, layers in enumerate(layers_of(account)):
        time = _micros(starts[at])
        activations = max(0, sum(layers) - account.fixed_bytes - account.output_bytes)
        found.append(_counter("memory", time, dict(zip(LAYERS, layers, strict=True))))
        found.append(_counter("activations", time, {"bytes": activations}))
    return found


def _counter(name: str, time: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": PID, "tid": 0, "ts": time, "args": values}


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)
