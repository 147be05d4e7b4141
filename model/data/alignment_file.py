"""Opens a file with an alignment, compressed or not, and finds its format. Free of torch."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from itertools import chain, count

from evoplan.model.data.a3m import MAX_LINE, parse_a3m
from evoplan.model.data.records import AlignmentError, BadRecords, Problem, Record, printable
from evoplan.model.data.stockholm import is_stockholm, parse_stockholm

_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    _GZIP: "is compressed with gzip more than once; decompress it first (gunzip)",
    b"BZh": "is compressed with bzip2; decompress it first (bunzip2)",
    b"\xfd7zXZ": "is compressed with xz; decompress it first (unxz)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it first (unzstd)",
    b"PK\x03\x04": "is a zip archive; extract the alignment first (unzip)",
    b"CLUSTAL": "is in Clustal format; save it as Stockholm, A3M or aligned FASTA",
}


@contextmanager
def open_records(path: str | os.PathLike[str], bad: BadRecords) -> Iterator[Iterator[Record]]:
    """The sequences of a file in A3M, aligned FASTA or Stockholm format, gzip or not; read when asked for.

    Raises AlignmentError, also for a Problem that the caller finds with a record.
    """
    try:
        with _open(path) as file, _decompressed(file) as text_file:
            stockholm, lines = is_stockholm(_lines(text_file, bad))
            yield parse_stockholm(lines, bad) if stockholm else parse_a3m(lines, bad)
        return
    except Problem as problem:
        text = str(problem)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        text = "its gzip data is cut off or damaged; compress the alignment again"
    except OSError as error:
        text = _explain(error)
    raise AlignmentError(f"{shown(path)}: {text}")


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a message shows it."""
    return printable(os.fspath(path)) or repr("")


def _lines(file: BufferedIOBase, bad: BadRecords) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, without the white space around them, numbered from 1; of one entry."""
    lines = _all_lines(file)
    is_first = True
    for number, line in lines:
        if is_first:
            _refuse_other_formats(line)
        if b"\0" in line and not is_first and _ends_entry(line):
            row, _, rest = line.partition(b"\0")
            if not bad.skip:
                raise Problem(
                    f"line {number}: a null byte, which ends every entry of an mmseqs or ColabFold database; "
                    "delete it, or add --skip-bad to read the first entry"
                )
            if row.strip():
                yield number, row.strip()
            bad.note(f"line {number}: {_what_follows(rest, lines)}")
            return
        is_first = False
        yield number, line


def _all_lines(file: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise Problem(f"line {number} is over {MAX_LINE} characters; check that this is an alignment")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that Windows editors write
        line = line.strip()
        if line:
            yield number, line


def _ends_entry(line: bytes) -> bool:
    """Whether the null byte in a line ends an entry of a database: nothing follows it, or the next entry."""
    row, _, rest = line.partition(b"\0")
    rest = rest.strip(b"\0 \t\r")
    return not row.startswith(b">") and (not rest or rest.startswith((b">", b"#")))


def _what_follows(rest: bytes, lines: Iterator[tuple[int, bytes]]) -> str:
    """What is said of a null byte that ends an entry."""
    for text in chain([rest], (line for _, line in lines)):
        if text.strip(b"\0 \t\r"):
            return "what follows the null byte is another entry of the database, and was not read"
    return "dropped the null byte at the end"


def _refuse_other_formats(line: bytes) -> None:
    for start, says in _OTHER_FORMATS.items():
        if line.startswith(start):
            raise Problem(says)


def _open(path: str | os.PathLike[str]) -> BufferedReader:
    try:
        return open(path, "rb")
    except ValueError:  # a null byte or an unencodable character
        raise Problem("is no valid file name; check the path") from None


def _decompressed(file: BufferedReader) -> BufferedIOBase:
    # Peeked at, not read: a pipe cannot be read twice.
    return gzip.GzipFile(fileobj=file) if file.peek(len(_GZIP)).startswith(_GZIP) else file


def _explain(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "no such file; check the path"
        case IsADirectoryError():
            return "is a directory; name a file with an alignment inside it"
        case PermissionError():
            return "may not be read; check the file's permissions"
    return f"cannot be read ({printable(error.strerror or str(error))}); check the path and the disk"
