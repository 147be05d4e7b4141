"""Reads a multiple sequence alignment from an A3M or aligned FASTA file. Free of torch.

Tokens are the 23 classes of AlphaFold 2's masked-MSA head (Jumper et al. 2021, Suppl. 1.9.9): the 20 amino
acids by one-letter code, X for an unknown one, '-' for a gap, and the mask, which no file holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import BinaryIO, NamedTuple

import numpy as np

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
TOKENS = (*AMINO_ACIDS, "X", "-", "[mask]")
N_TOKENS = len(TOKENS)
UNKNOWN, GAP, MASK = range(len(AMINO_ACIDS), N_TOKENS)

_PADDING, _INSERTED, _ILLEGAL = 253, 254, 255  # what a character can be besides a token
_AMBIGUOUS = {"B": "D", "Z": "E", "U": "C", "J": "X", "O": "X"}  # as AlphaFold 2's data pipeline reads them
_MAX_LINE = 1 << 24  # characters; no protein is longer, and a file without line ends must not fill memory
_ANNOTATIONS = ("ss_pred", "ss_conf", "ss_dssp", "sa_dssp")  # rows of HH-suite that are not sequences
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed with gzip; decompress it first (gunzip)",
    b"BZh": "is compressed with bzip2; decompress it first (bunzip2)",
    b"\xfd7zXZ": "is compressed with xz; decompress it first (unxz)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it first (unzstd)",
    b"PK\x03\x04": "is a zip archive; extract the alignment first (unzip)",
    b"# STOCKHOLM": "is in Stockholm format; convert it to A3M first (HH-suite: reformat.pl sto a3m IN OUT)",
    b"CLUSTAL": "is in Clustal format; convert it to A3M first (HH-suite: reformat.pl clu a3m IN OUT)",
}


def _character_codes() -> np.ndarray:
    """What each of the 256 bytes stands for in a row: a token, an insertion, padding, or nothing legal."""
    codes = np.full(256, _ILLEGAL, dtype=np.uint8)
    codes[list(b"abcdefghijklmnopqrstuvwxyz")] = _INSERTED
    codes[ord(".")] = _PADDING
    for token, letter in enumerate(TOKENS[:MASK]):
        codes[ord(letter)] = token
    for letter, meaning in _AMBIGUOUS.items():
        codes[ord(letter)] = codes[ord(meaning)]
    return codes


_CODES = _character_codes()


class AlignmentError(ValueError):
    """The file is no usable alignment. The message is one line: the file, what is wrong, and what to do."""


class _Problem(Exception):
    """What is wrong with the file, before its name is put in front."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Rows of related sequences over the residues of the first, the query.

    names: one per row, the header without '>'. tokens: uint8 [n_seq, n_res], indices into `TOKENS`.
    deletions: int32 [n_seq, n_res], how many residues of the row were left out directly before this column
    (Suppl. Table 1: deletions to the left of every position; what follows the last column is not counted).
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    deletions: np.ndarray

    @property
    def n_seq(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_res(self) -> int:
        return self.tokens.shape[1]


class _Record(NamedTuple):
    name: str
    line: int  # of the header
    codes: np.ndarray

    def __str__(self) -> str:
        return f"sequence {_quoted(self.name)} (line {self.line})"


def read_alignment(path: str | os.PathLike[str], max_sequences: int | None = None) -> Alignment:
    """Read an A3M or aligned FASTA file, at most its first `max_sequences` rows; what follows is not read.

    The first sequence is the query, and its residues are the columns. Upper-case letters and '-' are columns;
    lower-case letters and '.' are insertions between them. B, Z and U are read as D, E and C; J and O as X.
    Where an aligned FASTA's query has a gap, the column is dropped, and what other rows have there is counted
    as an insertion, as HH-suite's `reformat.pl -M first` does. Comments (#) before the first header, blank
    lines, and HH-suite's secondary-structure rows (ss_pred and the like) are passed over.

    Raises AlignmentError when the file cannot be read as an alignment, and ValueError when max_sequences is
    below 1.
    """
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences must be at least 1, not {max_sequences!r}")
    try:
        with _open(path) as file:
            return _aligned(islice(_records(_lines(file)), max_sequences))
    except _Problem as problem:
        text = str(problem)
    except OSError as error:
        text = _explain(error)
    raise AlignmentError(f"{_printable(os.fspath(path)) or repr('')}: {text}")


def _aligned(records: Iterator[_Record]) -> Alignment:
    query = next(records, None)
    if query is None:
        raise _Problem("is empty or holds no sequence; give an alignment in A3M or aligned FASTA format")
    kept = _query_columns(query)
    names, tokens, deletions = [], [], []
    for record in chain([query], records):
        row, inserted = _row(record, kept)
        names.append(record.name)
        tokens.append(row)
        deletions.append(inserted)
    return Alignment(tuple(names), np.stack(tokens), np.stack(deletions))


def _query_columns(query: _Record) -> np.ndarray:
    """Which of the file's columns hold a residue of the query: bool [columns]."""
    if _INSERTED in query.codes:
        raise _Problem(
            f"the query, {query}, has lower-case letters, which stand for insertions, but its residues are "
            "the columns; write them in upper case"
        )
    kept = query.codes[query.codes != _PADDING] != GAP
    if not kept.any():
        raise _Problem(f"the query, {query}, has no residues; put the query's sequence first")
    return kept


def _row(record: _Record, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n_res] and deletion counts [n_res] of one row over the kept columns."""
    is_column = record.codes < N_TOKENS
    tokens = record.codes[is_column]
    if len(tokens) != len(kept):
        dots = " ('.' stands for an insertion; write gaps as '-')" if _PADDING in record.codes else ""
        raise _Problem(
            f"{record} has {len(tokens)} aligned columns where the query has {len(kept)}{dots}; "
            "align the sequences first, for example with hhblits or mafft"
        )
    left_out = record.codes == _INSERTED
    left_out[is_column] = ~kept & (tokens != GAP)
    left_of_column = np.cumsum(left_out, dtype=np.int32)[is_column][kept]
    return tokens[kept], np.diff(left_of_column, prepend=np.int32(0))


def _records(lines: Iterable[tuple[int, bytes]]) -> Iterator[_Record]:
    """The sequences in order, without annotations."""
    name: str | None = None
    start = 0
    parts: list[np.ndarray] = []
    for number, line in lines:
        if line.startswith(b">"):
            if name is not None:
                yield from _finished(name, start, parts)
            name, start, parts = _decoded_name(number, line), number, []
        elif name is not None:
            if not _is_annotation(name):
                parts.append(_decoded_row(number, line, name))
        elif not line.startswith(b"#"):
            raise _Problem(
                f"line {number}: no '>' header before the first sequence, so this is neither A3M nor FASTA; "
                "put a line with '>' and a name above each sequence"
            )
    if name is not None:
        yield from _finished(name, start, parts)


def _finished(name: str, line: int, parts: list[np.ndarray]) -> Iterator[_Record]:
    """The record of a header and the rows below it; none where it is an annotation."""
    if _is_annotation(name):
        return
    if not parts:
        raise _Problem(
            f"line {line}: header {_quoted(name)} has no sequence below it; add it or delete the header"
        )
    yield _Record(name, line, np.concatenate(parts))


def _is_annotation(name: str) -> bool:
    return name.partition(" ")[0] in _ANNOTATIONS


def _decoded_name(number: int, line: bytes) -> str:
    try:
        return line[1:].decode().strip()
    except UnicodeDecodeError:
        raise _Problem(f"line {number}: the header is not UTF-8 text; save the file as UTF-8") from None


def _decoded_row(number: int, line: bytes, name: str) -> np.ndarray:
    codes = _CODES[np.frombuffer(line, dtype=np.uint8)]
    illegal = np.flatnonzero(codes == _ILLEGAL)
    if illegal.size:
        byte = line[illegal[0]]
        what = f"character {chr(byte)!r}" if 0x20 <= byte < 0x7F else f"byte 0x{byte:02x}"
        raise _Problem(
            f"line {number}: illegal {what} in sequence {_quoted(name)}; use amino-acid letters, "
            "'-' for gaps, and lower-case letters or '.' for insertions"
        )
    return codes


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, without the white space around them, numbered from 1."""
    first = True
    for number in count(1):
        line = file.readline(_MAX_LINE + 1)
        if not line:
            return
        if len(line) > _MAX_LINE:
            raise _Problem(f"line {number} is over {_MAX_LINE} characters; check that this is an alignment")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that Windows editors write
        line = line.strip()
        if not line:
            continue
        if first:
            _refuse_other_formats(line)
            first = False
        if b"\0" in line:
            raise _Problem(f"line {number}: holds binary data; give the alignment as plain text")
        yield number, line


def _refuse_other_formats(line: bytes) -> None:
    for start, says in _OTHER_FORMATS.items():
        if line.startswith(start):
            raise _Problem(says)


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except ValueError:  # a null byte or an unencodable character
        raise _Problem("is no valid file name; check the path") from None


def _explain(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "no such file; check the path"
        case IsADirectoryError():
            return "is a directory; name an A3M or FASTA file inside it"
        case PermissionError():
            return "may not be read; check the file's permissions"
    return f"cannot be read ({_printable(error.strerror or str(error))}); check the path and the disk"


def _quoted(name: str) -> str:
    shown = name if len(name) <= 60 else name[:57] + "..."
    return f"'{_printable(shown)}'"


def _printable(text: str) -> str:
    """The text with escapes for line ends, control characters and whatever else does not print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
