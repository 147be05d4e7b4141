"""Stockholm files through Biopython: every character is a column, the first sequence is the query."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from evoplan.model.config import InputShape
from evoplan.model.data.alignment import AlignmentError, alignment_shape, read_alignment
from tests.alignments import assert_same, letters, message, read_with_report
from tests.conftest import examples

pytest.importorskip("Bio", reason="the extra `alignments` is not installed")

Write = Callable[[str | bytes], Path]

WRAPPED = """# STOCKHOLM 1.0
#=GF ID   Kringle
#=GF CC
#=GF SQ   3

#=GS one/1-9 AC P00001.1
#=GS one/1-9 AC P00001.2
one/1-9        MK..V
#=GR one/1-9 SS HHHHHHHHHHHHHHHH
sp|Two|X       MKabV
one/1-9,       .-..-
#=GC SS_cons   HH..H

one/1-9        la-W
sp|Two|X       -aLu
one/1-9,       LA.b
#=GC SS_cons   HHHH
//
"""


def test_wrapped_blocks_by_hand(file: Write) -> None:
    a, said = read_with_report(file(WRAPPED), skip_bad=False)
    assert a.names == ("one/1-9", "sp|Two|X", "one/1-9,")
    assert letters(a) == ["MKVLAW", "MKV-AC", "---LAD"]
    assert a.deletions.tolist() == [[0] * 6, [0, 0, 2, 0, 0, 1], [0] * 6]
    assert said == ""


@pytest.mark.parametrize("pack", [bytes, lambda text: gzip.compress(text, mtime=0)])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_layout_and_compression_do_not_matter(
    tmp_path: Path, pack: Callable[[bytes], bytes], end: bytes
) -> None:
    content = b"\xef\xbb\xbf\n" + WRAPPED.encode().replace(b"   ", b"\t").replace(b"\n", end)
    paths = [tmp_path / "plain", tmp_path / "other"]
    paths[0].write_text(WRAPPED)
    paths[1].write_bytes(pack(content))
    assert_same(*map(read_alignment, paths))
    assert alignment_shape(paths[1]) == InputShape(3, 6)


def stockholm(*rows: str | bytes) -> bytes:
    lines = [b"# STOCKHOLM 1.0", *(row.encode() if isinstance(row, str) else row for row in rows), b"//", b""]
    return b"\n".join(lines)


def test_at_most_so_many_rows(file: Write) -> None:
    path = file(stockholm("q MK-A", "a MKRA", "b M*RA"))
    assert read_alignment(path, max_sequences=2).names == ("q", "a")
    assert "line 4: illegal character '*' in sequence 'b'" in message(path, max_sequences=3)


@pytest.mark.parametrize(
    ("row", "error", "reason"),
    [
        ("h MK*A", "line 4: illegal character '*' in sequence 'h'; a stop", "illegal character '*'"),
        ("h MK~A", "line 4: illegal character '~' in sequence 'h'; write gaps as", "illegal character '~'"),
        (b"h M\xe9KA", "line 4: illegal byte 0xe9 in sequence 'h'", "illegal byte 0xe9"),
        (b"h\xe9 MKA-", "line 4: the header is not UTF-8 text", "header is not UTF-8 text"),
        (b"h MK\0A", "line 4: holds binary data", "binary data"),
        ("h MK A", "line 4: illegal character ' ' in sequence 'h'", "illegal character ' '"),
    ],
)
def test_a_bad_row(file: Write, row: str | bytes, error: str, reason: str) -> None:
    path = file(stockholm("q MKVA", "a MK-A", row, "b .KVA"))
    text = message(path)
    assert text.startswith(f"{path}: {error}")
    assert text.endswith(", or add --skip-bad to leave the sequence out")
    a, said = read_with_report(path)
    assert (a.names, letters(a)) == (("q", "a", "b"), ["MKVA", "MK-A", "-KVA"])
    assert said.startswith(f"left out 1 of 4 sequences: {reason}: 1 (first 'h")
    assert said.endswith(", line 4)")


def test_the_line_is_that_of_the_block(file: Write) -> None:
    path = file(stockholm("q MK", "h MK", "", "q VA", "h V_"))
    assert "line 6: illegal character '_' in sequence 'h'" in message(path)


def test_a_bad_query_is_refused(file: Write) -> None:
    path = file(stockholm("q MK*A", "h MKVA"))
    assert "(it is the query, which cannot be left out)" in message(path, skip_bad=True)
    assert "has no residues" in message(file(stockholm("q ....", "h MKVA")))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (
            stockholm("q MKVA", "h MK-A") * 2,
            "line 5: a second alignment follows; give one whole alignment",
            "line 5: a second alignment follows, and was not read",
        ),
        (
            stockholm("q MKVA", "h MK-A").removesuffix(b"//\n"),
            "the line '//' that ends an alignment is missing, so sequences may be, too; give one",
            "the line '//' that ends an alignment is missing, so sequences may be, too",
        ),
        (
            stockholm("q MKVA", "h MK-A") + b"\0",
            "line 5: a null byte, which ends every entry of an mmseqs",
            "line 5: dropped the null byte at the end",
        ),
    ],
)
def test_more_or_less_than_one_alignment(file: Write, content: bytes, error: str, said: str) -> None:
    path = file(content)
    assert message(path).startswith(f"{path}: {error}")
    a, found = read_with_report(path)
    assert letters(a) == ["MKVA", "MK-A"]
    assert found == said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (stockholm(), "holds no sequence"),
        (stockholm("#=GF ID none"), "holds no sequence"),
        (stockholm("q MKVA", "h MKV"), "no valid Stockholm format (Sequences have different lengths"),
        (stockholm("q MKVA", "h"), "line 3: no name and row with a space between them"),
        (b"# STOCKHOLM 7\nq MKVA\n//\n", "no valid Stockholm format (Did not find STOCKHOLM header)"),
        (stockholm("q GGGAAACUCUGC", "h GGG...CUCUGC"), "are RNA or DNA"),
    ],
)
def test_what_is_no_stockholm_alignment(file: Write, content: bytes, says: str) -> None:
    for skip_bad in (False, True):
        assert says in message(file(content), skip_bad=skip_bad)


FUZZ = examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
COLUMNS = st.lists(st.text("acdwyACDWYBZUX-.", min_size=3, max_size=3), min_size=1, max_size=12).filter(
    lambda columns: any(column[0] not in "-." for column in columns)
)


@FUZZ
@given(columns=COLUMNS, width=st.integers(1, 12))
def test_the_same_as_aligned_fasta(tmp_path: Path, columns: list[str], width: int) -> None:
    """Wrapped at any width it is what FASTA in capitals, with '-' for every gap, is without the library."""
    rows = ["".join(row) for row in zip(*columns, strict=True)]
    blocks = [
        f"{name} {row[at : at + width]}"
        for at in range(0, len(columns), width)
        for name, row in enumerate(rows)
    ]
    (tmp_path / "wrapped").write_bytes(stockholm(*blocks))
    fasta = "".join(f">{name}\n{row.upper().replace('.', '-')}\n" for name, row in enumerate(rows))
    (tmp_path / "fasta").write_text(fasta)
    assert_same(read_alignment(tmp_path / "wrapped"), read_alignment(tmp_path / "fasta"))


LINES = st.lists(st.sampled_from(list(b"qqhh  \n\n//#=GC.-ACDacd*\t\x85\xa0\xc2\0")), max_size=80).map(bytes)


@FUZZ
@example(content=b"\xc2\xa0q ACD\n//\n")
@example(content=b"q/1-2 AC\nq/1-2 \xc2\xa0AC\n//\n")
@given(content=LINES | LINES.map(b"q ACD\nh AC-\n".__add__))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "family.sto"
    path.write_bytes(b"# STOCKHOLM 1.0\n" + content)
    for skip_bad in (False, True):
        try:
            read_with_report(path, skip_bad)
        except AlignmentError:
            message(path, skip_bad=skip_bad)
