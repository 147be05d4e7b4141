"""Host memory, in which storages of a device wait: copied away, freed there, and back again in time.

Tensors stay what they are; it is their storage that is empty meanwhile. So whoever holds a view of it,
autograd above all, need not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, UntypedStorage

from evoplan.cost_model.trace import Trace


class Waiting:
    """A storage on its way to host memory, there, or on its way back.

    Attributes:
        nbytes: its size, while it has one.
        kept: its content in host memory.
        copied: the end of the copy under way; None where none is.
    """

    def __init__(self, storage: UntypedStorage, nbytes: int) -> None:
        self.storage, self.nbytes = storage, nbytes
        self.kept: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def __del__(self) -> None:
        # Forgotten in the middle, by an error say: its memory is not another's before the copy has ended.
        if self.copied is not None:
            self.copied.synchronize()


class Host:
    """Moves storages to host memory and back, each in two steps: begun, and ended where it must be.

    On a GPU copies go on in streams of their own, one each way, beside what is computed meanwhile. A
    processor has no memory apart: there each copy is made when it begins, to memory that torch's allocator
    does not count, as a stand-in.
    """

    def leave(self, storages: Iterable[UntypedStorage]) -> list[Waiting]:
        """Begin to copy away; what was computed before is in the copy."""
        return [self._leave(storage) for storage in storages]

    def gone(self, waiting: Iterable[Waiting]) -> None:
        """End that: from here on the device has their memory for others."""
        for one in waiting:
            _wait(one)
            one.storage.resize_(0)

    def back(self, waiting: Iterable[Waiting]) -> None:
        """Begin to copy back, into memory that is theirs from here on."""
        for one in waiting:
            one.storage.resize_(one.nbytes)
            self._copy(one, back=True)

    def there(self, waiting: Iterable[Waiting]) -> None:
        """End that: what is computed from here on finds them as they were."""
        for one in waiting:
            _wait(one)
            one.kept = None

    def _leave(self, storage: UntypedStorage) -> Waiting:
        one = Waiting(storage, storage.nbytes())
        if storage.device.type == "cuda":  # torch keeps pinned memory for reuse, since pinning is slow
            one.kept = torch.empty(one.nbytes, dtype=torch.uint8, pin_memory=True)
        else:
            one.kept = torch.frombuffer(bytearray(max(1, one.nbytes)), dtype=torch.uint8)[: one.nbytes]
        self._copy(one, back=False)
        return one

    def _copy(self, one: Waiting, back: bool) -> None:
        device = one.storage.device
        here = torch.empty(0, dtype=torch.uint8, device=device).set_(one.storage)
        assert one.kept is not None
        to, of = (here, one.kept) if back else (one.kept, here)
        with torch.no_grad(), _beside(device, back):
            to.copy_(of, non_blocking=True)
            if device.type == "cuda":
                one.copied = torch.cuda.current_stream(device).record_event()


def _beside(device: torch.device, back: bool) -> AbstractContextManager[object]:
    """In the stream of copies that way, after all that has been launched."""
    if device.type != "cuda":
        return nullcontext()
    stream = _stream(device, back)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@cache
def _stream(device: torch.device, back: bool) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _wait(one: Waiting) -> None:
    if one.copied is not None:
        torch.cuda.current_stream(one.storage.device).wait_event(one.copied)
        one.copied = None


class FakeHost(Host):
    """A host for tensors without data: it tells a trace what leaves and what comes back."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def leave(self, storages: Iterable[UntypedStorage]) -> list[Waiting]:
        return [Waiting(storage, storage.nbytes()) for storage in storages]

    def gone(self, waiting: Iterable[Waiting]) -> None:
        for one in waiting:
            self._trace.left(one.storage)

    def back(self, waiting: Iterable[Waiting]) -> None:
        for one in waiting:
            self._trace.returned(one.storage)

    def there(self, waiting: Iterable[Waiting]) -> None:
        pass
