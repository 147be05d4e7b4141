"""State that waits in host memory: between which steps, and where it lies meanwhile.

In inference a tensor of the state that some steps don't read may leave the device while they run. The
caller's inputs stay where they are unless they are donated: they would not leave the device, since the caller
holds them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from evoplan.cost_model.liveness import Liveness
from evoplan.model.running.chain import State
from evoplan.planner.schedules.schedule import Run, Sequence, all_runs


def may_wait(liveness: Liveness, step: int) -> tuple[str, ...]:
    """State tensors that may lie on the host while a step runs: the chain's own, read by later steps only."""
    read = liveness.entry(range(step, step + 1))
    return tuple(v.tensor for v in liveness.alive(step) if liveness.owns(v) and v not in read)


def moves(schedule: Sequence) -> Iterator[tuple[Run | None, tuple[str, ...], tuple[str, ...]]]:
    """Each run in order, and what leaves the device before it and what then comes back.

    The last, None, stands for the end, when everything comes back.
    """
    away: tuple[str, ...] = ()
    for run in (*all_runs(schedule), None):
        after = () if run is None else run.away
        yield run, _without(after, away), _without(away, after)
        away = after


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def check_away(schedule: Sequence, liveness: Liveness) -> None:
    """Refuse what cannot be done.

    Raises:
        ValueError: a step needs what is on the host, or the chain does not own it; the step is named.
    """
    known = {version.tensor for version in liveness.alive(0)}
    for run in all_runs(schedule):
        for name in _without(run.away, may_wait(liveness, run.step)):
            reads = [version.tensor for version in liveness.entry(run.span)]
            why = "it is the caller's input until a step rewrites it, or nobody needs it any longer"
            if name not in known:
                why = f"the state has {', '.join(sorted(known))}"
            elif name in reads:
                why = "the step reads it"
            raise ValueError(f"step {run.step} cannot have {name} in host memory: {why}; plan again")


class Host:
    """Host memory, and the state tensors in it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, torch.device]] = {}

    def move(self, state: State, put: tuple[str, ...], take: tuple[str, ...]) -> None:
        """Put some tensors of the state here, then take some back."""
        for name in put:
            self.put(name, state.pop(name))
        for name in take:
            state[name] = self.take(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy."""
        if tensor.is_cuda:  # torch keeps pinned memory for reuse, since pinning is slow
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        else:  # the processor stands in for a device: its host is memory that torch's allocator doesn't count
            kept = torch.frombuffer(bytearray(tensor.nbytes), dtype=tensor.dtype).view(tensor.shape)
        self._kept[name] = kept.copy_(tensor), tensor.device

    def take(self, name: str) -> Tensor:
        """The tensor, on its device again."""
        kept, device = self._kept.pop(name)
        return kept.to(device, copy=True)


class FakeHost(Host):
    """A host for tensors without data, which would count as the device's memory if they were kept."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._shapes[name] = tensor.shape, tensor.dtype

    def take(self, name: str) -> Tensor:
        shape, dtype = self._shapes.pop(name)
        return torch.empty(shape, dtype=dtype)
