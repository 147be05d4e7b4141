"""Tells RNA and DNA from protein: A, C, G, T and U are letters of both. Free of torch.

Letters are taken for nucleotides where there are at least 8 besides N and X, at most 1 in 20 is no A, C, G, T
or U, and A, C, G, and T or U are each at least 1 in 50. A file is refused where that holds for its query and
for all its letters together.

Only a quarter of a protein's letters are among these, so chance makes eight such residues in a row, all four
kinds among them, once in 30,000 times. What evolution repeats lacks one of the four or has others:
poly-alanine, the A-A-T of antifreeze proteins, metallothioneins, a selenocysteine here and there.
"""

from __future__ import annotations

import numpy as np

_FEWEST = 8
_OTHERS_PER = 20
_EACH_PER = 50


class Nucleic:
    """Counts the letters of a file whose query could be RNA or DNA; of others it counts nothing more."""

    def __init__(self, query: bytes) -> None:
        self._counts = _letters(query)
        self._is_candidate = _are_nucleotides(self._counts)

    def add(self, text: bytes) -> None:
        """Count the letters of another sequence."""
        if self._is_candidate:
            self._counts += _letters(text)

    @property
    def found(self) -> bool:
        """Whether the query and all letters together are RNA or DNA."""
        return self._is_candidate and _are_nucleotides(self._counts)


def _letters(text: bytes) -> np.ndarray:
    """How often each letter occurs in either case, int64 [256] by its upper-case character."""
    return np.bincount(np.frombuffer(text.upper(), dtype=np.uint8), minlength=256)


def _are_nucleotides(counts: np.ndarray) -> bool:
    of = {letter: int(counts[ord(letter)]) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    each = (of["A"], of["C"], of["G"], of["T"] + of["U"])
    known = sum(of.values()) - of["N"] - of["X"]
    return (
        sum(each) >= _FEWEST and (known - sum(each)) * _OTHERS_PER <= known and min(each) * _EACH_PER >= known
    )
