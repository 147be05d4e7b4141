"""plan --msa and run --msa with odd files: one shape for both, and one line that says what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evoplan.planner.run import Settings
from tests.test_cli import call

FLAGS = ["--model", "alphafold2-narrow", "--n-blocks", "1", "--c-m", "16", "--c-z", "12"]
ROWS = ["MKVLAWDE", "MKVLAW-E", "MKV-AWDEaa", "M-VLAWDE"]
BAD = ">one[bold]\nMKVLAWD*\n>two\n>three\nMKVLAWD*\n"
ERROR = (
    "line 10: illegal character '*' in sequence 'one[bold]'; a stop codon is no residue; delete it, "
    "or add --skip-bad to leave the sequence out"
)
SAID = (
    "left out 3 of 7 sequences: illegal character '*': 2 (first 'one[bold]', line 9), "
    "no sequence below the header: 1 (first 'two', line 11)"
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """4 good sequences of 8 residues; the same and 3 bad ones."""
    good = "".join(f">s{i}\n{row}\n" for i, row in enumerate(ROWS))
    for name, content in (("good.a3m", good), ("bad.a3m", good + BAD)):
        (tmp_path / name).write_text(content)
    return str(tmp_path / "good.a3m"), str(tmp_path / "bad.a3m")


def test_plan_and_run_agree(capsys: pytest.CaptureFixture, tmp_path: Path, files: tuple[str, str]) -> None:
    good, bad = files
    plan, same = str(tmp_path / "plan.json"), str(tmp_path / "same.json")
    assert call(capsys, "plan", *FLAGS, "--msa", bad, "--out", plan) == (2, "", f"evoplan: {bad}: {ERROR}\n")
    assert not Path(plan).exists()
    code, _, error = call(capsys, "plan", *FLAGS, "--msa", bad, "--skip-bad", "--out", plan)
    assert (code, error) == (0, f"{bad}: {SAID}\n")
    code, _, error = call(capsys, "plan", *FLAGS, "--msa", good, "--out", same)
    assert (code, error) == (0, "")
    shapes = [json.loads(Path(path).read_text())["problem"]["shape"] for path in (plan, same)]
    assert shapes[0] == shapes[1]
    assert (shapes[0]["n_seq"], shapes[0]["n_res"]) == (4, 8)

    assert call(capsys, "run", plan, "--msa", bad) == (2, "", f"evoplan: {bad}: {ERROR}\n")
    results = []
    for msa, flags in ((bad, ["--skip-bad"]), (good, []), (good, ["--skip-bad"])):
        path = tmp_path / "run.json"
        code, out, error = call(
            capsys, "run", plan, "--msa", msa, *flags, "--steps", "2", "--json", str(path)
        )
        assert (code, error) == (0, "")
        assert (f"{bad}: {SAID}\n" in out) == (msa == bad)
        assert out.count("left out") == (msa == bad)
        results.append(json.loads(path.read_text())["losses"])
    assert results[0] == results[1] == results[2]


def test_a_plan_for_more_sequences(
    capsys: pytest.CaptureFixture, tmp_path: Path, files: tuple[str, str]
) -> None:
    plan = str(tmp_path / "plan.json")
    assert call(capsys, "plan", *FLAGS, "--n-seq", "7", "--n-res", "8", "--out", plan)[0] == 0
    code, _, error = call(capsys, "run", plan, "--msa", files[1], "--skip-bad")
    assert code == 2
    assert error == (
        f"evoplan: {files[1]}: 4 sequences, the plan is for 7; "
        f"plan for it with `evoplan plan --msa {files[1]} --skip-bad`\n"
    )


@pytest.mark.parametrize("command", ["plan", "roofline", "run"])
def test_skip_bad_needs_a_file(capsys: pytest.CaptureFixture, tmp_path: Path, command: str) -> None:
    plan = str(tmp_path / "plan.json")
    if command == "run":
        assert call(capsys, "plan", *FLAGS, "--n-seq", "3", "--n-res", "4", "--out", plan)[0] == 0
    given = [plan] if command == "run" else FLAGS
    code, _, error = call(capsys, command, *given, "--skip-bad")
    assert code == 2
    assert error == (
        "evoplan: --skip-bad is about an alignment's sequences; add --msa FILE, or leave it out\n"
    )


def test_ranks_must_agree() -> None:
    agreed = [Settings(skip_bad=skip).agreed() for skip in (False, True)]
    assert [values.pop("--skip-bad") for values in agreed] == ["False", "True"]
    assert agreed[0] == agreed[1]
    assert "--learning-rate" in agreed[0]


def test_stockholm_is_planned_and_run(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("Bio", reason="the extra `alignments` is not installed")
    path, plan = tmp_path / "family.sto", str(tmp_path / "plan.json")
    path.write_text("# STOCKHOLM 1.0\nq MKV\nh MaV\n\nq .LAWDE\nh kLAW-E\n//\n")
    assert call(capsys, "plan", *FLAGS, "--msa", str(path), "--out", plan)[0] == 0
    shape = json.loads(Path(plan).read_text())["problem"]["shape"]
    assert (shape["n_seq"], shape["n_res"]) == (2, 8)
    assert call(capsys, "run", plan, "--msa", str(path), "--steps", "1")[0] == 0
