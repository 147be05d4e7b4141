"""Rows of least times over a grid, and how much later each is than another, block by block of the grid."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from evoplan.planner.solvers.grid import Times

Integers = NDArray[np.int64]

BLOCK = 128  # grid points that are compared together


class TimesTable:
    """Rows of least times.

    Args:
        rows: how many at most.
        size: points of the grid.
        lead: how far below zero memory may be asked for; times are infinite there.

    Attributes:
        rows: the times, by row and memory; what is not filled is undefined.
        blocks: how many the grid has, and the points of one; the last goes on with the last time.
    """

    def __init__(self, rows: int, size: int, lead: int) -> None:
        self.blocks = count, points = -(-size // BLOCK), BLOCK
        self._lead = lead
        self._padded = np.empty((rows, lead + count * points))
        self.rows = self._padded[:, lead : lead + size]
        self._windows = sliding_window_view(self._padded.reshape(-1), BLOCK)
        self._filled = 0
        self._before = np.full(rows, -1)
        self._starts = np.full(rows, size)  # of what is not infinite
        self._shifts = np.zeros(rows, np.int64)
        self._rises = np.full((rows, count), -np.inf)  # seen with so much less memory
        self._rises_below = np.full((rows, count), -np.inf)  # with no more memory than a block has

    @property
    def nbytes(self) -> int:
        """Size of what is filled."""
        return self._filled * self._padded.shape[1] * self._padded.itemsize

    def fill(self, row: int, times: Times, before: int = -1, shift: int = 0) -> None:
        """Set a row.

        Args:
            before: a row that `risen` compares it with; -1 for none.
            shift: the rows are compared at so much less memory.
        """
        self._filled += 1
        self._padded[row, : self._lead] = np.inf
        self.rows[row] = times
        self._padded[row, self._lead + len(times) :] = times[-1]
        self._before[row], self._shifts[row] = before, shift
        self._starts[row] = len(times) - int(times[::-1].searchsorted(np.inf))
        if before >= 0:
            rises = self._compare(row, before, 0)
            np.minimum.accumulate(rises, out=self._rises_below[row])
            self._rises[row] = self._compare(row, before, shift) if shift else rises

    def _compare(self, row: int, before: int, shift: int) -> NDArray[np.float64]:
        """How much later a row is than another at least, by block, both seen with `shift` less memory."""
        rises = np.full(self.blocks[0], np.inf)
        # What is infinite in both, and so not a number here, stays infinite: any rise is a bound.
        first = min(self._starts[row], self._starts[before]) // BLOCK
        seen = slice(self._lead - shift + first * BLOCK, self._padded.shape[1] - shift)
        with np.errstate(invalid="ignore"):
            risen = self._padded[row, seen] - self._padded[before, seen]
        np.fmin.reduce(risen.reshape(-1, BLOCK), axis=1, out=rises[first:], initial=np.inf)
        return rises

    def row(self, number: int) -> Times:
        """A row, which may be written into."""
        times: Times = self.rows[number]
        return times

    def at(self, rows: Integers, blocks: Integers, kept: Integers | int) -> NDArray[np.float64]:
        """Times of rows in blocks, with `kept` less memory, side by side."""
        starts = rows * self._padded.shape[1] + blocks * BLOCK + (self._lead - kept)
        times: NDArray[np.float64] = self._windows[starts]
        return times

    def risen(self, rows: Integers, old: Integers, kept: Integers | int) -> NDArray[np.float64] | float:
        """How much later each of `rows`, seen with `kept` less memory, is than `old` at least, by block."""
        same = (rows == old) | (old < 0)  # nothing is known of what was not seen before
        if same.all():
            return 0.0
        rises: NDArray[np.float64] = self._rises[rows]
        rises[np.flatnonzero((self._before[rows] != old) | (self._shifts[rows] != kept))] = -np.inf
        rises[np.flatnonzero(same)] = 0.0
        return rises

    def risen_below(self, row: int, before: int) -> NDArray[np.float64] | float:
        """How much later a row is than another at least, with no more memory than each block has."""
        if self._before[row] != before:
            return -np.inf
        rises: NDArray[np.float64] = self._rises_below[row]
        return rises
