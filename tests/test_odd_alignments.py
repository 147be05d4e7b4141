"""Odd files as tools write them: strict by default, and what `skip_bad` leaves out and says."""

from __future__ import annotations

import gzip
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import strategies as st

from evoplan.model.alignment import (
    AlignmentError,
    SkippedWarning,
    alignment_shape,
    read_alignment,
    sample_alignment,
)
from evoplan.model.config import InputShape
from tests.alignments import assert_same, letters, message, read_with_report
from tests.conftest import examples

Write = Callable[[str | bytes], Path]
QUERY = ">q\nMKVLA\n"
LEAVE = ", or add --skip-bad to leave the sequence out"
LETTERS = "use amino-acid letters, '-' for gaps, and lower-case letters or '.' for insertions"
NO_RESIDUE = "a stop codon is no residue; delete it"


def illegal(what: str, line: int, name: str, advice: str) -> str:
    return f"line {line}: illegal {what} in sequence '{name}'; {advice}"


# What follows the query's five residues; the strict error; why it is left out.
BAD_RECORDS = [
    (">h\nMKVLA*\n", illegal("character '*'", 4, "h", NO_RESIDUE), "illegal character '*'"),
    (">h\nMK*LA\n", illegal("character '*'", 4, "h", NO_RESIDUE), "illegal character '*'"),
    (">h\nMK~LA\n", illegal("character '~'", 4, "h", "write gaps as '-'"), "illegal character '~'"),
    (">h\nMK_LA\n", illegal("character '_'", 4, "h", "write gaps as '-'"), "illegal character '_'"),
    (">h\nMK?LA\n", illegal("character '?'", 4, "h", LETTERS), "illegal character '?'"),
    (">h\nMKV LA\n", illegal("character ' '", 4, "h", LETTERS), "illegal character ' '"),
    (">h\n1 MKVLA\n", illegal("character '1'", 4, "h", LETTERS), "illegal character '1'"),
    (">h\n;old\nMKVLA\n", illegal("character ';'", 4, "h", "delete the comment"), "illegal character ';'"),
    (">h\nMKV\nL*\n", illegal("character '*'", 5, "h", NO_RESIDUE), "illegal character '*'"),
    (b">h\nMK\xe9LA\n", illegal("byte 0xe9", 4, "h", LETTERS), "illegal byte 0xe9"),
    (
        ">h\n",
        "line 3: header 'h' has no sequence below it; add it or delete the header",
        "no sequence below the header",
    ),
    (
        ">h\nMKV\n",
        "sequence 'h' (line 3) has 3 aligned columns where the query has 5; "
        "align the sequences first, for example with hhblits or mafft",
        "another number of columns than the query",
    ),
    (
        ">h\nMKaLA\n",
        "sequence 'h' (line 3) has 4 aligned columns where the query has 5; "
        "align the sequences first, for example with hhblits or mafft",
        "another number of columns than the query",
    ),
    (
        b">h\xe9lice\nMKVLA\n",
        "line 3: the header is not UTF-8 text; save the file as UTF-8",
        "header is not UTF-8 text",
    ),
    (b">h\nMK\0LA\n", "line 4: holds binary data; give the alignment as plain text", "binary data"),
    (b">h\0\nMKVLA\n", "line 3: holds binary data; give the alignment as plain text", "binary data"),
]


@pytest.mark.parametrize(("record", "error", "reason"), BAD_RECORDS)
def test_a_bad_record(file: Write, record: str | bytes, error: str, reason: str) -> None:
    """At the end and in the middle: refused with its line, or left out and said; the others stay the same."""
    record = record.encode() if isinstance(record, str) else record
    for after in (b"", b">g\nM-aVLA\n"):
        path = file(QUERY.encode() + record + after)
        assert message(path) == f"{path}: {error}{LEAVE}"
        a, said = read_with_report(path)
        name = record[1:].partition(b"\n")[0].decode(errors="replace").replace("\0", "\\x00")
        assert said == f"left out 1 of {3 if after else 2} sequences: {reason}: 1 (first '{name}', line 3)"
        assert_same(a, read_alignment(file(QUERY.encode() + after)))


def test_reasons_are_counted(file: Write) -> None:
    path = file(QUERY + ">a\nMK*LA\n>b\n>c\nMKVLA\n>d\nMK*\nLA*\n>e\nM\n>f\nMKVLA\n>")
    a, said = read_with_report(path)
    assert a.names == ("q", "c", "f")
    assert said == (
        "left out 5 of 8 sequences: illegal character '*': 2 (first 'a', line 3), "
        "no sequence below the header: 2 (first 'b', line 5), "
        "another number of columns than the query: 1 (first 'e', line 11)"
    )
    first = read_alignment(path, max_sequences=2, skip_bad=True, report=lambda _: None)
    assert first.names == ("q", "c")


def test_without_a_reader_it_is_a_warning(file: Write) -> None:
    path = file(QUERY + ">h\nMKVLA*\n")
    for read in (read_alignment, alignment_shape, lambda *a, **k: sample_alignment(*a, 1, 0, **k)):
        with pytest.warns(SkippedWarning, match="left out 1 of 2 sequences") as caught:
            read(path, skip_bad=True)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_alignment(file(QUERY), skip_bad=True)  # nothing was left out


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (">q\nMKVLA*\n", illegal("character '*'", 2, "q", NO_RESIDUE)),
        (">q\nMK_LA\n", illegal("character '_'", 2, "q", "write gaps as '-'")),
        (">q\nMKVLA\n#comment\n", illegal("character '#'", 3, "q", "delete the comment")),
        (">q\n", "line 1: header 'q' has no sequence below it; add it or delete the header"),
        (b">q\nMK\0VLA\n", "line 2: holds binary data; give the alignment as plain text"),
    ],
)
def test_a_bad_query_is_refused(file: Write, query: str | bytes, error: str) -> None:
    path = file((query.encode() if isinstance(query, str) else query) + b">h\nMKVLA\n")
    assert message(path) == f"{path}: {error}"
    assert message(path, skip_bad=True) == f"{path}: {error} (it is the query, which cannot be left out)"


@pytest.mark.parametrize(
    "content", ["", "ACDE\n>q\nACDE\n", ">q\n----\n", ">q\nMKVaLA\n>h\nMKV-LA\n", QUERY.encode("utf-16"),
                b"\0>\0q\0\n\0A\0\n", b"\0>q\nAC\n", gzip.compress(QUERY.encode(), mtime=0)[:-9], b"BZh9"]
)  # fmt: skip
def test_what_is_no_alignment_is_refused_all_the_same(file: Write, content: str | bytes) -> None:
    path = file(content)
    assert message(path, skip_bad=True) == message(path)


LOWER = "the query, sequence 'q' (line 1), is in lower case, and was read as upper case"


def test_a_lower_case_query(file: Write) -> None:
    path = file(">q\nmkvla\n>h\nMK-LA\n>g\nMKVLaA\n")
    assert message(path).endswith("write them in upper case, or add --skip-bad to read them so")
    a, said = read_with_report(path)
    assert letters(a) == ["MKVLA", "MK-LA", "MKVLA"]
    assert a.deletions.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert said == LOWER
    a, said = read_with_report(file(">q\nmk.vu-\n>h\nMKaVLA\n>f\nMKVLA\n>g\nmkvl-\n"))
    assert letters(a) == ["MKVC", "MKVL", "MKVL"]
    assert a.deletions.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert said == (
        "left out 1 of 4 sequences: another number of columns than the query: 1 (first 'g', line 7); " + LOWER
    )


DROPPED = "line 5: dropped the null byte at the end"
ANOTHER = "line 5: what follows the null byte is another entry of the database, and was not read"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (b"\n\0", DROPPED),
        (b"\n\0\n", DROPPED),
        (b"\n\0\0\0\n\0", DROPPED),
        (b"\n\0>q2\nMKVLA\n", ANOTHER),
        (b"\n\0\n>q2\nMKVLA\n", ANOTHER),
        (b"\n\0#3,2\t1,1\n>101\nMKVLA\n\0", ANOTHER),
        (b"\n\0\n\0not an alignment\xff", ANOTHER),
        (b"\0", DROPPED.replace("5", "4")),
        (b"\0\r\n>q2\nMKVLA\n", ANOTHER.replace("5", "4")),
        (b"\0>q2\nMKVLA\n", ANOTHER.replace("5", "4")),
    ],
)
def test_an_entry_of_a_database(file: Write, end: bytes, said: str) -> None:
    path = file(QUERY.encode() + b">h\nMK-LA" + end)
    assert f"{said.partition(':')[0]}: a null byte, which ends every entry" in message(path)
    a, found = read_with_report(path)
    assert (a.names, letters(a)) == (("q", "h"), ["MKVLA", "MK-LA"])
    assert found == said


# Aligned FASTA: the query, another row, its letters, and its deletions.
ALIGNED = [
    ("MKVLA", "MK.LA", "MK-LA", [0, 0, 0, 0, 0]),
    ("MK-VLA", "MK.VL.", "MKVL-", [0, 0, 0, 0, 0]),
    ("MK-VLA", "MKsVLA", "MKVLA", [0, 0, 1, 0, 0]),
    ("MK--VLA", "MKsSVL.", "MKVL-", [0, 0, 2, 0, 0]),
    ("MK.VLA", "MK-VLA", "MKVLA", [0, 0, 0, 0, 0]),
    ("MK.VLA", "MKSVLA", "MKVLA", [0, 0, 1, 0, 0]),
    ("MK.-VLA", "..sSVLA", "--VLA", [0, 0, 2, 0, 0]),
    ("-MKVLA-", "AMK-LAG", "MK-LA", [1, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("query", "row", "read", "deletions"), ALIGNED)
def test_aligned_fasta(file: Write, query: str, row: str, read: str, deletions: list[int]) -> None:
    a, _ = read_with_report(file(f">q\n{query}\n>h\n{row}\n"), skip_bad=False)
    assert letters(a) == ["MKVLA", read]
    assert a.deletions.tolist() == [[0] * 5, deletions]


def rows_like(query: str) -> st.SearchStrategy[str]:
    """Rows of a query's length, which insert where it has gaps; a few do so elsewhere."""
    letters = [st.sampled_from("acdwACDWXBZU-." if c in "-." else "ACDWXBZU-.") for c in query]
    anything = st.text("acdwACDWXBZU-.", min_size=len(query), max_size=len(query))
    return st.one_of(*[st.tuples(*letters).map("".join)] * 4, anything)


ROWS = (
    st.text("ACDWXBZUJO-...", min_size=2, max_size=9)
    .filter(lambda row: row.strip("-."))
    .flatmap(lambda query: st.tuples(st.just(query), st.lists(rows_like(query), min_size=1, max_size=4)))
)
FUZZ = examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(rows=ROWS)
def test_rows_of_one_length_are_read_by_position(tmp_path: Path, rows: tuple[str, list[str]]) -> None:
    """Where a row is an A3M row as well, that counts; else it is column by column, written out here."""
    query, others = rows
    meaning = str.maketrans("BZUJO.", "DECXX-")
    expected = []
    for row in others:
        a3m = "".join(c for c in row if not c.islower() and c != ".")
        if len(a3m) == len(query.replace(".", "")) or any(
            c.islower() and q not in "-." for c, q in zip(row, query, strict=True)
        ):
            continue
        deletions, count, tokens = [], 0, ""
        for c, q in zip(row, query, strict=True):
            if q in "-.":
                count += c not in "-."
            else:
                deletions.append(count)
                tokens += c.translate(meaning)
                count = 0
        expected.append((row, tokens, deletions))
    assume(expected)
    path = tmp_path / "family.a3m"
    path.write_text("".join(f">h\n{row}\n" for row in (query, *(row for row, _, _ in expected))))
    a = read_alignment(path)
    assert letters(a)[1:] == [tokens for _, tokens, _ in expected]
    assert a.deletions[1:].tolist() == [deletions for _, _, deletions in expected]


ROW_BYTES = b">>>\n\n\r#-.ACDEXBacd*~_ \0\xff"
ALMOST = st.lists(st.sampled_from(list(ROW_BYTES)), max_size=80).map(bytes)


@FUZZ
@example(content=b">q\nAC\n\0")
@given(content=ALMOST | ALMOST.map(b">q\nAC-D\n>".__add__) | ALMOST.map(b">q\nacd\n>h\n".__add__))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    """What strict reading takes is read alike; what is left out is said; the rest is an error of one line."""
    path = tmp_path / "family.a3m"
    path.write_bytes(content)
    strict, skipping = (error_of(path, skip_bad) for skip_bad in (False, True))
    if skipping is not None:
        assert strict is not None
        assert skipping == message(path, skip_bad=True)
        return
    a, said = read_with_report(path)
    if strict is None:
        assert not said
        assert_same(a, read_alignment(path))
    else:
        assert said
        assert "--skip-bad" in strict
        assert strict.isprintable()


def error_of(path: Path, skip_bad: bool) -> str | None:
    try:
        read_alignment(path, skip_bad=skip_bad, report=lambda _: None)
    except AlignmentError as error:
        return str(error)
    return None


def test_stockholm_without_biopython(file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Bio", None)
    path = file("# STOCKHOLM 1.0\nq MKVLA\n//\n")
    assert message(path) == (
        f"{path}: is in Stockholm format, which Biopython reads; install it: "
        "pip install 'evoplan[alignments]'"
    )
    assert read_alignment(file(QUERY)).n_seq == 1


def test_files_that_were_read_before_are_read_alike(file: Write) -> None:
    """With skip_bad as without it, and nothing is said."""
    for content in (
        QUERY.replace("\n", "\r\n") + ">h\r\nMK-LA\r\n",
        "#3,2\t1,1\n>101\t102\nMKVLA\n>h\nMKVLA\n>101\nMKV--\n",
        "#A3M#\n" + QUERY + ">   \nMKVLA\n",
        QUERY + ">q\nMKVLA\n>q\nMKVLA\n",
        ">ss_pred\nHHHHH\n>ss_conf\n99999\n" + QUERY,
        ">q\nXXXXX\n>h\nMKVLA\n",
        gzip.compress(QUERY.encode(), mtime=0) + gzip.compress(b">h\nMKVLA\n", mtime=0) + b"\0" * 512,
    ):
        path = file(content)
        a, said = read_with_report(path)
        assert said == ""
        assert_same(a, read_alignment(path))
        assert a.n_res == 5
    assert alignment_shape(path) == InputShape(2, 5)
