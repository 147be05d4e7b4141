"""Reading alignments: what a row means, and one clear line for every file that is none."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from evoplan.model.config import InputShape
from evoplan.model.data.alignment import (
    GAP,
    MASK,
    N_TOKENS,
    POSITION_BYTES,
    TOKENS,
    Alignment,
    AlignmentError,
    alignment_shape,
    read_alignment,
    sample_alignment,
)
from tests.alignments import assert_same, letters, message
from tests.conftest import examples

ROOT = Path(__file__).parents[1]
UBIQUITIN = ROOT / "experiments/data/ubiquitin.a3m"


def test_tokens() -> None:
    assert "".join(TOKENS[:20]) == "ACDEFGHIKLMNPQRSTVWY"
    assert TOKENS[20:] == ("X", "-", "[mask]")
    assert (GAP, MASK, N_TOKENS) == (21, 22, 23)


def test_a3m_by_hand(file) -> None:
    a = read_alignment(file(">q the query\nACDE\n>two\nkA-rrDEgg\n>three\n-..CdD.-\n"))
    assert a.names == ("q the query", "two", "three")
    assert (a.n_seq, a.n_res) == (3, 4)
    assert letters(a) == ["ACDE", "A-DE", "-CD-"]
    assert a.deletions.tolist() == [[0, 0, 0, 0], [1, 0, 2, 0], [0, 0, 1, 0]]
    assert a.tokens.dtype == np.uint8
    assert a.deletions.dtype == np.int32


def test_dots_that_pad_insertions_are_no_columns(file) -> None:
    a = read_alignment(file(">q\nA..C\n>b\nAkkC\n"))
    assert letters(a) == ["AC", "AC"]
    assert a.deletions.tolist() == [[0, 0], [0, 2]]


def test_columns_without_a_query_residue_are_dropped_and_counted(file) -> None:
    a = read_alignment(file(">q\n-AC--D-\n>b\nKAC-RDW\n>c\nKA-RRD-\n>d\n-ACrRGD-\n"))
    assert letters(a) == ["ACD", "ACD", "A-D", "ACD"]
    assert a.deletions.tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 2], [0, 0, 3]]


def test_unusual_letters(file) -> None:
    assert letters(read_alignment(file(">q\nBZUJOX\n"))) == ["DECXXX"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_layout_does_not_matter(file, end: str) -> None:
    lines = ["#A3M#", "", "> q ", "AC", "", "  DE ", ">", "ACD", "E", "", ">b", "AC-E"]
    a = read_alignment(file(b"\xef\xbb\xbf" + end.join(lines).encode()))
    assert a.names == ("q", "", "b")
    assert letters(a) == ["ACDE", "ACDE", "AC-E"]


def test_annotation_rows_are_passed_over(file) -> None:
    a = read_alignment(file(">ss_pred PSIPRED\nHHC\n>ss_conf\n987\n>q\nACD\n>b\nACD\n>ss_dssp\n"))
    assert a.names == ("q", "b")


def test_max_sequences_stops_reading(file) -> None:
    path = file(">q\nAC\n>b\nAD\n>c\nA*\n")
    assert read_alignment(path, max_sequences=2).names == ("q", "b")
    assert read_alignment(path, max_sequences=1).n_seq == 1
    assert "line 6" in message(path, max_sequences=3)
    with pytest.raises(ValueError, match="max_sequences must be at least 1"):
        read_alignment(path, max_sequences=0)


def test_deep_alignment(file) -> None:
    row = "ACDEFGHIKL" * 5
    a = read_alignment(
        file("".join(f">s{i}\n{row[:25]}{'k' * (i % 3)}{row[25:]}\n" for i in range(0, 9000, 3)))
    )
    assert (a.n_seq, a.n_res) == (3000, 50)


def test_more_than_255_insertions(file) -> None:
    a = read_alignment(file(f">q\nAC\n>b\nA{'k' * 70_000}C\n"))
    assert a.deletions[1].tolist() == [0, 70_000]


def test_shipped_file() -> None:
    a = read_alignment(UBIQUITIN)
    assert (a.n_seq, a.n_res) == (20, 76)
    assert letters(a)[0] == "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    assert (a.tokens == GAP).any()
    assert a.deletions[a.names.index("elongin B Homo sapiens")].nonzero()[0].tolist() == [12, 61]
    assert a.deletions.max() == 7
    assert len(set(letters(a))) == a.n_seq


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("\n \r\n", "empty"),
        ("# a comment\n", "empty"),
        (">ss_pred\nHHH\n", "empty"),
        ("ACDE\n>q\nACDE\n", "line 1: no '>' header before the first sequence"),
        ("\n\n2 4\nACDE\n", "line 3: no '>' header before the first sequence"),
        (">q\n", "line 1: header 'q' has no sequence"),
        (">q\nACDE\n\n>b\n>c\nACDE\n", "line 4: header 'b' has no sequence"),
        (">q\nACDE\n>b\nACD\n", "sequence 'b' (line 3) has 3 aligned columns where the query has 4"),
        (">q\nACDE\n>b\nACkDEE\n", "has 5 aligned columns where the query has 4"),
        (">q\nACE\n>b\nAC.EE\n", "write gaps as '-'"),
        (">q\nACDE\n>b\nAC\nD*\n", "line 5: illegal character '*' in sequence 'b'"),
        (">q\nAC DE\n", "illegal character ' '"),
        (">q\nAC\x1bE\n", "illegal byte 0x1b"),
        (">q\nACDÉ\n", "illegal byte 0xc3"),
        (">" + "q" * 500 + "\n7\n", "'" + "q" * 57 + "...'"),
        (">q\nACdE\n", "the query, sequence 'q' (line 1), has lower-case letters"),
        (">q\nacde\n", "write them in upper case"),
        (">q\n----\n>b\nACDE\n", "the query, sequence 'q' (line 1), has no residues"),
        (">q\n....\n", "has no residues"),
        (b">q\nAC\0DE\n", "line 2: holds binary data"),
        (b">q\0\nACDE\n", "line 1: holds binary data"),
        (">q\nACDE\n".encode("utf-16"), "binary data"),
        (b">q\nACDE\n>caf\xe9\nACDE\n", "line 3: the header is not UTF-8"),
        (gzip.compress(gzip.compress(b">q\nACDE\n", mtime=0), mtime=0), "gunzip"),
        (b"BZh91AY&SY", "bunzip2"),
        (b"\xfd7zXZ\x00", "unxz"),
        (b"\x28\xb5\x2f\xfd\x04", "unzstd"),
        (b"PK\x03\x04\x14", "unzip"),
        ("CLUSTAL W (1.83)\n\nq ACDE\n", "Clustal format; save it as Stockholm"),
    ],
)
def test_broken_files(file, content: str | bytes, says: str) -> None:
    assert says in message(file(content))


def test_line_without_end(file, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("a3m", "alignment_file"):
        monkeypatch.setattr(f"evoplan.model.data.{module}.MAX_LINE", 100)
    assert "line 2 is over 100 characters" in message(file(">q\n" + "A" * 101))
    assert "line 4: sequence 'q' is over 100 characters" in message(file(">q\n" + ("A" * 40 + "\n") * 9))


def test_unusable_paths(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "absent.a3m")
    assert "is a directory" in message(tmp_path)
    for path, shown in (("absent\n.a3m", "absent\\n.a3m"), ("nul\0.a3m", "nul\\x00.a3m"), ("", "''")):
        with pytest.raises(AlignmentError) as caught:
            read_alignment(path)
        assert str(caught.value).startswith(f"{shown}: ")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied"), "check the file's permissions"),
        (OSError(5, "Input/output error"), "cannot be read (Input/output error)"),
    ],
)
def test_files_that_do_not_open(monkeypatch: pytest.MonkeyPatch, error: OSError, says: str) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("builtins.open", refuse)
    assert says in message("family.a3m")


def test_reading_can_fail_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.RawIOBase):
        chunks = iter([b">q\nAC\n>b\nA"])

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            for chunk in self.chunks:
                buffer[: len(chunk)] = chunk
                return len(chunk)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *_: io.BufferedReader(Failing()))
    with pytest.raises(AlignmentError, match=r"^family.a3m: cannot be read \(Input/output error\)"):
        read_alignment("family.a3m")


def test_compressed_files_are_read(file) -> None:
    text = b">q\nACDE\n>two\nkA-rrDEgg\n"
    assert_same(read_alignment(file(gzip.compress(text, mtime=0))), read_alignment(file(text)))
    packed = gzip.compress(text, mtime=0)
    for broken in (packed[:-9], packed[:10] + b"\xff" * 30, packed[:15] + b"\0" * 30, b"\x1f\x8b"):
        assert "gzip data is cut off or damaged" in message(file(broken))
    assert "line 3: header 'b' has no sequence" in message(file(gzip.compress(b">q\nACDE\n>b\n", mtime=0)))


def test_a_sample_has_the_query_first_and_keeps_the_order(file) -> None:
    path = file(">q\nACD\n" + "".join(f">{i}\nA{'k' * i}{'CD'[i % 2]}-\n" for i in range(40)))
    whole = read_alignment(path)
    drawn = sample_alignment(path, 7, seed=3)
    assert drawn.n_seq == 7
    assert drawn.names[0] == "q"
    chosen = [whole.names.index(name) for name in drawn.names]
    assert chosen == sorted(set(chosen))
    assert (drawn.tokens == whole.tokens[chosen]).all()
    assert (drawn.deletions == whole.deletions[chosen]).all()
    assert_same(drawn, sample_alignment(path, 7, seed=3))
    assert drawn.names != sample_alignment(path, 7, seed=4).names
    assert sample_alignment(path, 1, seed=0).names == ("q",)
    for n_seq, pool_bytes, kept in ((41, 0, 41), (999, 0, 41), (2, 999, 41), (2, 150, 10), (30, 150, 30)):
        assert sample_alignment(path, n_seq, 0, pool_bytes).n_seq == kept
    assert_same(whole, sample_alignment(path, 41, seed=5))
    with pytest.raises(ValueError, match="n_seq must be at least 1"):
        sample_alignment(path, 0, seed=0)


def test_every_row_is_as_likely_to_be_sampled(file) -> None:
    path = file(">q\nA\n" + "".join(f">{i}\nA\n" for i in range(10)))
    draws = 2000
    counts = np.zeros(10)
    for seed in range(draws):
        counts[[int(name) for name in sample_alignment(path, 4, seed).names[1:]]] += 1
    assert counts.sum() == 3 * draws
    deviation = (draws * 0.3 * 0.7) ** 0.5
    assert abs(counts - 0.3 * draws).max() < 4 * deviation


def test_shape_of_a_file(file) -> None:
    assert alignment_shape(UBIQUITIN) == InputShape(20, 76)
    assert alignment_shape(file(">q\n-AC-\n>b\nAA-A\n")) == InputShape(2, 2)


def test_deep_alignments_are_read_in_a_stream(tmp_path: Path) -> None:
    """5,000 sequences of 500 residues would take 12.5 MB; 100 of them are kept."""
    n_seq, n_res, n_kept = 5000, 500, 100
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY-", dtype=np.uint8)
    path = tmp_path / "deep.a3m"
    with path.open("wb") as out:
        for i, row in enumerate(letters[np.random.default_rng(0).integers(0, 21, (n_seq, n_res))]):
            out.write(b">%d\n%s\n" % (i, bytes(row).replace(b"-", b"A") if i == 0 else bytes(row)))
    kept_bytes = n_kept * n_res * POSITION_BYTES
    most = {}
    tracemalloc.start()
    try:
        for name, read in (
            ("shape", alignment_shape),
            ("sample", partial(sample_alignment, n_seq=n_kept, seed=0)),
        ):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            found = read(path)
            assert found.n_res == n_res
            assert found.n_seq == (n_seq if name == "shape" else n_kept)
            most[name] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    a_few_rows = 200_000
    assert most["shape"] < a_few_rows
    # The rows, and the same once more while they are put together.
    assert kept_bytes < most["sample"] < 2 * kept_bytes + a_few_rows


def check_error_or_alignment(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        a = read_alignment(path)
    except AlignmentError as error:
        text = str(error)
    else:
        check_alignment(a)
        assert alignment_shape(path) == InputShape(a.n_seq, a.n_res)
        assert_same(a, sample_alignment(path, a.n_seq, seed=0))
        return
    assert text.startswith(f"{path}: ")
    assert text.isprintable()  # so it is one line


def check_alignment(a: Alignment) -> None:
    assert a.tokens.shape == a.deletions.shape == (len(a.names), a.n_res)
    assert min(a.tokens.shape) >= 1
    assert a.tokens.max() <= GAP
    assert (a.tokens[0] < GAP).all()
    assert a.deletions.min() >= 0


ROW_BYTES = b">>>\n\n\r#-.ACDEXBacd* \0\xff"
ALMOST = st.lists(st.sampled_from(list(ROW_BYTES)), max_size=60).map(bytes)
FUZZ = examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@example(content=b">q\r\rAC")
@given(content=st.binary(max_size=200) | ALMOST | ALMOST.map(b">q\nAC-D\n>".__add__))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    check_error_or_alignment(tmp_path / "family.a3m", content)


@FUZZ
@given(content=st.text(max_size=200), head=st.sampled_from(["", ">", ">q\nACD\n>", ">q\nACD\n>b\n"]))
def test_any_text(tmp_path: Path, content: str, head: str) -> None:
    check_error_or_alignment(tmp_path / "family.a3m", (head + content).encode("utf-8", "surrogatepass"))


ROWS = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.text("ACDEFGHIKLMNPQRSTVWY", min_size=n, max_size=n),
        st.lists(
            st.lists(
                st.tuples(st.text("acdy", max_size=3), st.sampled_from("ACDEFGHIKLMNPQRSTVWYX-")),
                min_size=n,
                max_size=n,
            ),
            max_size=4,
        ),
    )
)


@FUZZ
@given(rows=ROWS)
def test_rows_come_back(tmp_path: Path, rows: tuple[str, list[list[tuple[str, str]]]]) -> None:
    query, others = rows
    path = tmp_path / "family.a3m"
    written = [query, *("".join(inserted + letter for inserted, letter in row) for row in others)]
    path.write_text("".join(f">{i}\n{row}\n" for i, row in enumerate(written)))
    a = read_alignment(path)
    assert letters(a) == [query, *("".join(letter for _, letter in row) for row in others)]
    assert a.deletions[1:].tolist() == [[len(inserted) for inserted, _ in row] for row in others]


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, evoplan.model.data.alignment as a\n"
        "a.read_alignment(sys.argv[1]); print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, UBIQUITIN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
