"""Cutting an axis into pieces, and loops over them that a trace need not run to the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class PieceSample:
    """While installed, loops over pieces run one piece of each kind instead of all.

    The first piece makes the buffers that later ones add to, and pieces differ in length by at most
    one: so the first, the second, and the first shorter one stand for all. For traces on tensors
    without data only.

    Attributes:
        repeat: how many pieces the present one stands for.
    """

    repeat = 1

    def sent(self, size: int, messages: int) -> None:
        """Told of each collective of imagined ranks: bytes that this rank sends, and in how many messages."""


_sample: ContextVar[PieceSample | None] = ContextVar("piece_sample", default=None)


@contextmanager
def sampled_pieces(sample: PieceSample) -> Iterator[None]:
    """Install a sample for the code inside."""
    token = _sample.set(sample)
    try:
        yield
    finally:
        _sample.reset(token)


def note_sent(size: int, messages: int) -> None:
    """Tell the installed sample of a collective that is only imagined."""
    sample = _sample.get()
    if sample is not None:
        sample.sent(size, messages)


def even_spans(size: int, n: int) -> list[slice]:
    """n slices of 0..size whose lengths differ by at most one, the longer ones first."""
    if not 1 <= n <= size:
        raise ValueError(f"cannot cut {size} into {n} pieces")
    length, longer = divmod(size, n)
    return [slice(i * length + min(i, longer), (i + 1) * length + min(i + 1, longer)) for i in range(n)]


def spans(size: int, n: int) -> Iterator[slice]:
    """The slices of `even_spans`, to loop over."""
    pieces = even_spans(size, n)
    sample = _sample.get()
    if sample is None:
        yield from pieces
        return
    first, rest, outer = pieces[0], pieces[1:], sample.repeat  # loops may lie within one another
    kinds = Counter([(1, first.stop)] + [(2, piece.stop - piece.start) for piece in rest])
    for piece, kind in zip(pieces, [(1, first.stop)] + [(2, p.stop - p.start) for p in rest], strict=True):
        if count := kinds.pop(kind, 0):
            sample.repeat = outer * count
            yield piece
    sample.repeat = outer
