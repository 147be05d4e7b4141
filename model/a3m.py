"""Parses A3M and aligned FASTA files, one sequence after the other. Free of torch.

Tokens are the 23 classes of AlphaFold 2's masked-MSA head (Jumper et al. 2021, Suppl. 1.9.9): the 20 amino
acids by one-letter code, X for an unknown one, '-' for a gap, and the mask, which no file holds.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from typing import BinaryIO, NamedTuple

import numpy as np

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
TOKENS = (*AMINO_ACIDS, "X", "-", "[mask]")
N_TOKENS = len(TOKENS)
UNKNOWN, GAP, MASK = range(len(AMINO_ACIDS), N_TOKENS)

PADDING, INSERTED, _ILLEGAL = 253, 254, 255  # what a character can be besides a token
_AMBIGUOUS = {"B": "D", "Z": "E", "U": "C", "J": "X", "O": "X"}  # as AlphaFold 2's data pipeline reads them
_MAX_LINE = 1 << 24  # characters; no protein is longer, and a file without line ends must not fill memory
_ANNOTATIONS = ("ss_pred", "ss_conf", "ss_dssp", "sa_dssp")  # rows of HH-suite that are not sequences
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    _GZIP: "is compressed with gzip more than once; decompress it first (gunzip)",
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
    codes[list(b"abcdefghijklmnopqrstuvwxyz")] = INSERTED
    codes[ord(".")] = PADDING
    for token, letter in enumerate(TOKENS[:MASK]):
        codes[ord(letter)] = token
    for letter, meaning in _AMBIGUOUS.items():
        codes[ord(letter)] = codes[ord(meaning)]
    return codes


_CODES = _character_codes()


class AlignmentError(ValueError):
    """The file is no usable alignment. The message is one line: the file, what is wrong, and what to do."""


class Problem(Exception):
    """What is wrong with the file, before its name is put in front."""


class Record(NamedTuple):
    name: str
    line: int  # of the header
    codes: np.ndarray

    def __str__(self) -> str:
        return f"sequence {_quoted(self.name)} (line {self.line})"


@contextmanager
def open_records(path: str | os.PathLike[str]) -> Iterator[Iterator[Record]]:
    """The sequences of an A3M or aligned FASTA file, plain or compressed with gzip; read when asked for.

    Raises AlignmentError, also for a Problem that the caller finds with a record.
    """
    try:
        with _open(path) as file, _decompressed(file) as text_file:
            yield _parsed(_lines(text_file))
        return
    except Problem as problem:
        text = str(problem)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        text = "its gzip data is cut off or damaged; compress the alignment again"
    except OSError as error:
        text = _explain(error)
    raise AlignmentError(f"{_printable(os.fspath(path)) or repr('')}: {text}")


def _parsed(lines: Iterable[tuple[int, bytes]]) -> Iterator[Record]:
    """The sequences in order, without annotations."""
    name: str | None = None
    start = 0
    length = 0
    parts: list[np.ndarray] = []
    for number, line in lines:
        if line.startswith(b">"):
            if name is not None:
                yield from _finished(name, start, parts)
            name, start, length, parts = _decoded_name(number, line), number, 0, []
        elif name is not None:
            if not _is_annotation(name):
                parts.append(_decoded_row(number, line, name))
                length += len(line)
                if length > _MAX_LINE:
                    raise Problem(
                        f"line {number}: sequence {_quoted(name)} is over {_MAX_LINE} characters; "
                        "check that this is an alignment"
                    )
        elif not line.startswith(b"#"):
            raise Problem(
                f"line {number}: no '>' header before the first sequence, so this is neither A3M nor FASTA; "
                "put a line with '>' and a name above each sequence"
            )
    if name is not None:
        yield from _finished(name, start, parts)


def _finished(name: str, line: int, parts: list[np.ndarray]) -> Iterator[Record]:
    """The record of a header and the rows below it; none where it is an annotation."""
    if _is_annotation(name):
        return
    if not parts:
        raise Problem(
            f"line {line}: header {_quoted(name)} has no sequence below it; add it or delete the header"
        )
    yield Record(name, line, np.concatenate(parts))


def _is_annotation(name: str) -> bool:
    return name.partition(" ")[0] in _ANNOTATIONS


def _decoded_name(number: int, line: bytes) -> str:
    try:
        return line[1:].decode().strip()
    except UnicodeDecodeError:
        raise Problem(f"line {number}: the header is not UTF-8 text; save the file as UTF-8") from None


def _decoded_row(number: int, line: bytes, name: str) -> np.ndarray:
    codes = _CODES[np.frombuffer(line, dtype=np.uint8)]
    illegal = np.flatnonzero(codes == _ILLEGAL)
    if illegal.size:
        byte = line[illegal[0]]
        what = f"character {chr(byte)!r}" if 0x20 <= byte < 0x7F else f"byte 0x{byte:02x}"
        raise Problem(
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
            raise Problem(f"line {number} is over {_MAX_LINE} characters; check that this is an alignment")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that Windows editors write
        line = line.strip()
        if not line:
            continue
        if first:
            _refuse_other_formats(line)
            first = False
        if b"\0" in line:
            raise Problem(f"line {number}: holds binary data; give the alignment as plain text")
        yield number, line


def _refuse_other_formats(line: bytes) -> None:
    for start, says in _OTHER_FORMATS.items():
        if line.startswith(start):
            raise Problem(says)


def _open(path: str | os.PathLike[str]) -> BufferedReader:
    try:
        return open(path, "rb")
    except ValueError:  # a null byte or an unencodable character
        raise Problem("is no valid file name; check the path") from None


def _decompressed(file: BufferedReader) -> BinaryIO:
    # Peeked at, not read: a pipe cannot be read twice.
    return gzip.GzipFile(fileobj=file) if file.peek(len(_GZIP)).startswith(_GZIP) else file


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
