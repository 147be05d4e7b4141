"""Sequences of a file, what can be wrong with one, and what happens then. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evoplan.model.data.alphabet import A3M_CODES, ILLEGAL

_ADVICE = {
    "*": "a stop codon is no residue; delete it",
    "_": "write gaps as '-'",
    "~": "write gaps as '-'",
    "#": "delete the comment",
    ";": "delete the comment",
}
_LETTERS = "use amino-acid letters, '-' for gaps, and lower-case letters or '.' for insertions"


class AlignmentError(ValueError):
    """The file is no usable alignment. The message is one line: the file, what is wrong, and what to do."""


class Problem(Exception):
    """What is wrong with the file, before its name is put in front."""


class BadRecord(Exception):
    """What is wrong with one sequence.

    Attributes:
        reason: the same in fewer words, without the place: sequences are counted by it.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class Record(NamedTuple):
    """A sequence: its header without '>', the header's line, its characters and what they stand for."""

    name: str
    line: int
    text: bytes
    codes: np.ndarray  # uint8 [characters]

    def __str__(self) -> str:
        return f"sequence {quoted(self.name)} (line {self.line})"


@dataclass
class _Kind:
    """Sequences that were left out for one reason: how many, and the first."""

    count: int
    name: str
    line: int


class BadRecords:
    """What happens to bad sequences of a file: the first is refused, or all are left out and counted.

    Attributes:
        skip: leave them out. The query never is: the others are aligned to it.
        seen: sequences so far, good or bad.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.seen = 0
        self._kinds: dict[str, _Kind] = {}
        self._notes: list[str] = []

    def judge(self, bad: BadRecord, name: str, line: int, query: bool) -> None:
        """Count a bad sequence. Problem: it is the query, or is not to be left out."""
        if query:
            raise Problem(f"{bad} (it is the query, which cannot be left out)" if self.skip else str(bad))
        if not self.skip:
            raise Problem(f"{bad}, or add --skip-bad to leave the sequence out")
        self._kinds.setdefault(bad.reason, _Kind(0, name, line)).count += 1

    def note(self, text: str) -> None:
        """Say something else that was not read as it stands."""
        self._notes.append(text)

    def summary(self) -> str | None:
        """What was left out, and why, in one line; None where the file was read as it stands."""
        said = list(self._notes)
        if self._kinds:
            count = sum(kind.count for kind in self._kinds.values())
            reasons = ", ".join(
                f"{reason}: {kind.count} (first {quoted(kind.name)}, line {kind.line})"
                for reason, kind in self._kinds.items()
            )
            said.insert(0, f"left out {count:,} of {self.seen:,} sequences: {reasons}")
        return "; ".join(said) or None


def check_row(number: int, row: bytes, name: str) -> None:
    """Raise BadRecord where a character is no part of an alignment."""
    illegal = row.translate(A3M_CODES).find(ILLEGAL)
    if illegal < 0:
        return
    if b"\0" in row:
        raise binary(number)
    byte = row[illegal]
    what = f"character {chr(byte)!r}" if 0x20 <= byte < 0x7F else f"byte 0x{byte:02x}"
    raise BadRecord(
        f"line {number}: illegal {what} in sequence {quoted(name)}; {_ADVICE.get(chr(byte), _LETTERS)}",
        f"illegal {what}",
    )


def binary(number: int) -> BadRecord:
    """A null byte in the middle of a line."""
    return BadRecord(f"line {number}: holds binary data; give the alignment as plain text", "binary data")


def not_text(number: int) -> BadRecord:
    """A name that nobody can read."""
    return BadRecord(
        f"line {number}: the header is not UTF-8 text; save the file as UTF-8", "header is not UTF-8 text"
    )


def quoted(name: str) -> str:
    """A sequence's name, cut short, as a message shows it."""
    shown = name if len(name) <= 60 else name[:57] + "..."
    return f"'{printable(shown)}'"


def printable(text: str) -> str:
    """The text with escapes for line ends, control characters and whatever else does not print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
