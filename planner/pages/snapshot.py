"""A predicted memory snapshot, as PyTorch's memory viewer reads it (`torch.cuda.memory._snapshot()`).

What is live at each moment is allocated when it begins and freed when it ends. A plan knows no addresses and
no fragmentation: every allocation has an address that nothing else ever has, in a segment of its own, so that
what is reserved is what is allocated.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

from evoplan.planner.pages.account import Account
from evoplan.planner.pages.timing import starts_of

BASE = 0x7F0000000000  # the first address

Event = dict[str, Any]


def memory_viz(account: Account) -> bytes:
    """The snapshot of an account as a pickle of plain lists, dictionaries, texts and whole numbers."""
    return pickle.dumps(snapshot_of(account), protocol=4)


def snapshot_of(account: Account) -> dict[str, Any]:
    """The snapshot itself: the trace of what is allocated and freed, and the segments that are left.

    At any time the sizes of what is allocated add up to what the account has; at most to its peak.
    """
    trace = _Trace(account)
    trace.record()
    return {
        "segments": [_segment(*left) for left in trace.live.values()],
        "device_traces": [trace.events],
        "allocator_settings": {},
        "external_annotations": [],
    }


class _Trace:
    """Events in order: at each moment, first what is gone is freed, then what is new is allocated."""

    def __init__(self, account: Account) -> None:
        self.account, self.starts = account, starts_of(account)
        self.events: list[Event] = []
        self.live: dict[object, tuple[int, int, list[Event]]] = {}
        self.next = BASE

    def record(self) -> None:
        """All of the step."""
        held, workspace = self.account.holdings.held, self.account.holdings.workspace
        begin: defaultdict[int, list[int]] = defaultdict(list)
        end: defaultdict[int, list[int]] = defaultdict(list)
        for at, one in enumerate(held):
            begin[one.first].append(at)
            end[one.last + 1].append(at)
        for name, size in self.account.static.items():
            self._alloc(name, size, 0, [_frame(name, "static", 0)])
        for at in range(len(workspace) + 1):
            for gone in end[at]:
                self._free(gone, at)
            if at and workspace[at - 1]:
                self._free("of the step", at)
            for new in begin[at]:
                one = held[new]
                self._alloc(new, one.bytes, at, [_frame(self.account.describe(one), one.kind, 0)])
            if at < len(workspace) and workspace[at]:
                self._alloc("of the step", workspace[at], at, [_frame("of the step", "workspace", 0)])

    def _run(self, at: int) -> list[Event]:
        """The run before or in which something is made, and its phase: frames from the inside out."""
        moments, passes = self.account.moments, self.account.holdings.passes
        if at == len(moments):
            return [_frame("the end", self.account.title, 0)]
        how = f" as {run.strategy}" if (run := passes[at]) else ""
        step = f"{moments[at].phase} of {self.account.where(moments[at])}{how}"
        return [_frame(step, "moment", at + 1), _frame(moments[at].phase, self.account.title, 0)]

    def _event(self, action: str, at: int, address: int, size: int, frames: list[Event]) -> None:
        micros = round(self.starts[at] * 1e6)
        self.events.append(
            {"action": action, "addr": address, "size": size, "stream": 0, "time_us": micros,
             "frames": frames}
        )  # fmt: skip

    def _alloc(self, key: object, size: int, at: int, inner: list[Event]) -> None:
        frames = inner + self._run(at)
        self.live[key] = self.next, size, frames
        for action in ("segment_alloc", "alloc"):
            self._event(action, at, self.next, size, frames)
        self.next += size

    def _free(self, key: object, at: int) -> None:
        address, size, frames = self.live.pop(key)
        for action in ("free_requested", "free_completed", "segment_free"):
            self._event(action, at, address, size, frames)


def _frame(name: str, filename: str, line: int) -> Event:
    return {"name": name, "filename": filename, "line": line}


def _segment(address: int, size: int, frames: list[Event]) -> dict[str, Any]:
    block = {"address": address, "size": size, "requested_size": size, "state": "active_allocated",
             "frames": frames}  # fmt: skip
    return {
        "device": 0, "address": address, "total_size": size, "allocated_size": size, "active_size": size,
        "requested_size": size, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
        "is_expandable": False, "frames": frames, "blocks": [block],
    }  # fmt: skip
