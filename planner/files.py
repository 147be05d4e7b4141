"""Files that commands write: refused before the work where they cannot be, and then all of it or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

STDOUT = "-"  # for --json: standard output
PICTURES = ("png", "svg", "pdf")


def check_writable(
    *paths: str | Path | None, json_path: str | Path | None = None, reads: Iterable[str | Path | None] = ()
) -> None:
    """Refuse a path that cannot be written before the work is done.

    Args:
        paths: that will be written.
        json_path: of the result as JSON, one more of them; "-" is standard output.
        reads: files that the same command reads, which it must not write over.

    Raises:
        ValueError: one cannot be written, is read, or is given twice; the message names it.
    """
    if STDOUT in map(str, filter(None, paths)):
        raise ValueError("only --json - is standard output; name a file")
    written = [str(path) for path in (*paths, json_path) if path is not None and str(path) != STDOUT]
    for path in written:
        _check_one(path)
        for other in reads:
            if other and _same(path, other):
                raise ValueError(f"{path}: is read as {other}, and would be overwritten; name another file")
    for first, second in combinations(written, 2):
        if _same(first, second):
            raise ValueError(f"{second}: is the same file as {first}; name another for one of them")


def _check_one(path: str) -> None:
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:  # a loop of links, a name that is too long, a file where a folder should be
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    if not path or (mode is not None and stat.S_ISDIR(mode)):
        raise ValueError(f"{path}: is a folder; name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is not an ordinary file; name one")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: folder {target.parent} is not writable; name another")
    if mode is not None and not os.access(target, os.W_OK):
        raise ValueError(f"{path}: is write-protected; name another file")


def _same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths are one file, through links of either kind and however they are spelled."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there yet
        return os.path.realpath(one) == os.path.realpath(other)


def make_folder(path: str | Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        ValueError: it cannot be made, or written to; the message names it.
    """
    if not str(path):
        raise ValueError("a folder without a name; name one")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made a folder ({error.strerror}); name another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: folder is not writable; name another")
    return Path(path)


def picture_format(path: str | Path) -> str:
    """The format that a picture's suffix names, png without one; ValueError where it names none."""
    found = Path(path).suffix.lstrip(".").lower() or PICTURES[0]
    if found not in PICTURES:
        raise ValueError(f"{path}: pictures are written as png, svg or pdf, not {found!r}")
    return found


def write_json(path: str | Path, document: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one; "-" is standard output."""
    text = json.dumps(document, indent=1) + "\n"
    if str(path) != STDOUT:
        write_text(path, text)
    elif sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def write_text(path: str | Path, text: str) -> None:
    """Write a text, as UTF-8, all of it or nothing."""
    write_atomically(path, text.encode())


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary one beside it; OSError leaves nothing behind.

    A link stays, and what it points to is replaced; a file that is replaced keeps its permissions.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a device, say, in whose place a file would lie then
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, _permissions(target))
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:  # which names the temporary file, or none
        raise OSError(error.errno, error.strerror, str(path)) from None


def _permissions(path: Path) -> int:
    """Of the file that is replaced, or of a new one."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


class FolderLock:
    """A folder held by one process: a file in it, locked until `close` or until the process ends."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file

    def close(self) -> None:
        """Let the folder go, and leave nothing in it."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def lock_folder(folder: Path) -> FolderLock | None:
    """Hold a folder for this process; None where another one holds it.

    The lock is the kernel's, so that a process that is killed leaves a file, but no lock. Where the file
    system has no locks, nothing is held.
    """
    path = folder / ".lock"
    while True:
        file = path.open("a", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # no locks here
            return FolderLock(path, file)
        if _is(path, file):
            return FolderLock(path, file)
        file.close()  # whoever held it has deleted it in between


def _is(path: Path, file: TextIO) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
