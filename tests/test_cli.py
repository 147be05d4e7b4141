"""The command line: one line per error, the promised exit codes, nothing half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evoplan.model.data.alignment import TOKENS
from evoplan.model.data.batch import random_alignment
from evoplan.planner.commands.cli import main
from evoplan.planner.sizes import parse_size

SMALL = [
    "--model",
    "alphafold2-narrow",
    "--n-blocks",
    "2",
    "--n-seq",
    "5",
    "--n-res",
    "7",
    "--c-m",
    "16",
    "--c-z",
    "12",
]
ALIGNMENT = str(Path(__file__).parents[1] / "experiments" / "data" / "ubiquitin.a3m")


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    try:
        main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    main(["plan", *SMALL, "--memory", "8MiB", "--out", str(path)])
    return str(path)


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys, time; from evoplan.planner.commands.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules and time.process_time() < 10"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sweep" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "alphafold9"],
        ["plan", "--n-seq", "0"],
        ["plan", "--n-res", "-3"],
        ["plan", "--n-seq", "1000000000", "--n-res", "1000000"],
        ["plan", "--memory", "lots"],
        ["plan", "--memory", "0"],
        ["plan", "--dtype", "int8"],
        ["plan", "--device", "abacus"],
        ["plan", "--dropout", "1.5"],
        ["plan", "--solver", "magic"],
        ["plan", "--msa", "nothing.a3m"],
        ["plan", "--out", "no/such/folder/plan.json"],
        ["plan", "--no-such-flag"],
        ["sweep", "--points", "1"],
        ["sweep", *SMALL, "--mode", "inference"],
        ["show", "nothing.json"],
        ["verify", "nothing.json"],
        ["run", "nothing.json"],
        ["dance"],
    ],
    ids=" ".join,
)
def test_bad_input(capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    code, _, error = call(capsys, *arguments)
    assert code == 2
    assert error.startswith("evoplan: ")
    assert len(error.strip().splitlines()) == 1


def test_nothing_fits(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = tmp_path / "result.json"
    code, _, error = call(
        capsys, "plan", *SMALL, "--memory", "100kB", "--out", str(out), "--json", str(result)
    )
    assert code == 3
    assert "least" in error
    assert not out.exists()
    assert json.loads(result.read_text())["least_feasible_bytes"] > 100_000


def test_plan_show_verify_run(capsys: pytest.CaptureFixture, plan_file: str, tmp_path: Path) -> None:
    assert call(capsys, "show", plan_file, "--json", str(tmp_path / "show.json"))[0] == 0
    timeline = json.loads((tmp_path / "show.json").read_text())["timeline"]
    plan = json.loads(Path(plan_file).read_text())
    assert max(moment["peak_bytes"] for moment in timeline) == plan["predicted"]["peak_bytes"]
    for flags, backend in (([], "cpu-allocator"), (["--simulate"], "simulated")):
        path = tmp_path / "verify.json"
        assert call(capsys, "verify", plan_file, *flags, "--repeats", "1", "--json", str(path))[0] == 0
        found = json.loads(path.read_text())
        assert found["backend"] == backend
        assert found["ok"]
        assert (found["measured_step_seconds"] is None) == (backend == "simulated")
    assert call(capsys, "verify", plan_file, "--blocks", "1", "--repeats", "1")[0] == 0
    path = tmp_path / "run.json"
    assert call(capsys, "run", plan_file, "--steps", "2", "--json", str(path))[0] == 0
    assert len(json.loads(path.read_text())["losses"]) == 2
    code, printed, _ = call(capsys, "run", plan_file, "--steps", "1")
    assert code == 0
    assert "not measured: the one step was for its memory" in printed


def test_run_refuses_another_alignment(capsys: pytest.CaptureFixture, plan_file: str) -> None:
    code, _, error = call(capsys, "run", plan_file, "--msa", ALIGNMENT)
    assert code == 2
    assert "76 residues" in error
    assert "of 7;" in error


TINY_FLAGS = {
    "alphafold2-narrow": ["--n-blocks", "1", "--c-m", "16", "--c-z", "12"],
    "alphafold2-extra": ["--n-blocks", "1", "--c-m", "16", "--c-z", "12"],
    "alphafold2-trunk": ["--n-blocks", "1", "--c-m", "16", "--c-z", "12", "--n-extra", "6"],
}


@pytest.fixture
def alignment_file(tmp_path: Path) -> str:
    """12 sequences of 9 residues."""
    a = random_alignment(12, 9, 0)
    path = tmp_path / "family.a3m"
    path.write_text(
        "".join(
            f">{name}\n{''.join(TOKENS[token] for token in row)}\n"
            for name, row in zip(a.names, a.tokens, strict=True)
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("model", "mode", "data"),
    [
        ("alphafold2-narrow", "inference", "alignment"),
        ("alphafold2-extra", "training", "alignment"),
        ("alphafold2-trunk", "training", "alignment"),
        ("alphafold2-trunk", "inference", "random"),
    ],
)
def test_every_model_runs(
    capsys: pytest.CaptureFixture, tmp_path: Path, alignment_file: str, model: str, mode: str, data: str
) -> None:
    plan, result = str(tmp_path / "plan.json"), tmp_path / "run.json"
    flags = ["--model", model, *TINY_FLAGS[model], "--mode", mode, "--n-seq", "5"]
    assert call(capsys, "plan", *flags, "--msa", alignment_file, "--out", plan)[0] == 0
    shape = json.loads(Path(plan).read_text())["problem"]["shape"]
    extra = 6 if model == "alphafold2-trunk" else None
    assert (shape["n_seq"], shape["n_res"], shape["n_extra"]) == (5, 9, extra)
    given = ["--msa", alignment_file] if data == "alignment" else []
    code, _, error = call(capsys, "run", plan, *given, "--steps", "2", "--json", str(result))
    assert (code, error) == (0, "")
    found = json.loads(result.read_text())
    assert found["ok"]
    assert found["measured_peak_bytes"] == pytest.approx(found["predicted_peak_bytes"], rel=0.01)
    assert found["losses"][0] != found["losses"][1]  # other rows, other masks


def test_a_trunk_needs_rows_beside_its_clusters(capsys: pytest.CaptureFixture, alignment_file: str) -> None:
    code, _, error = call(capsys, "plan", "--model", "alphafold2-trunk", "--msa", alignment_file)
    assert code == 2
    assert error.startswith(f"evoplan: {alignment_file}: all 12 sequences are cluster centres")
    assert "--n-seq below 12" in error


def test_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert call(capsys, "sweep", *SMALL, "--points", "5", "--out", str(out), "--plot", str(picture))[0] == 0
    points = json.loads(out.read_text())["points"]
    assert all(point["peak_bytes"] <= point["budget_bytes"] for point in points)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, error = call(capsys, "sweep", *SMALL, "--points", "2", "--plot", str(tmp_path / "sweep.doc"))
    assert code == 2
    assert "png, svg or pdf" in error


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * 2**30), ("800MB", 800_000_000), ("1.5 kib", 1536), ("7", 7), ("2b", 2)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1e3", "5 furlongs", "0.1", "nan", "inf"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_certify_prints_and_keeps_the_gap(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = call(capsys, "plan", *SMALL, "--memory", "6MB", "--certify", "--out", str(path))
    assert code == 0
    assert (
        "certificate (CP-SAT): persistent schedules, checkpoints at most one deep, as charged by dp"
        in " ".join(out.split())
    )
    solver = json.loads(path.read_text())["solver"]
    assert [found["max_depth"] for found in solver["certificates"]] == [None, 1, None]
    assert solver["gap"] == solver["certificates"][0]["gap"]
    assert 0 <= solver["gap"] < 0.01
    assert 0 <= solver["certificates"][1]["gap"] < 0.01


@pytest.mark.parametrize("solver", ["cp-sat", "seed-dp", "large"])
def test_other_solvers_make_plans_that_verify(
    capsys: pytest.CaptureFixture, tmp_path: Path, solver: str
) -> None:
    path = str(tmp_path / "plan.json")
    assert call(capsys, "plan", *SMALL, "--memory", "8MiB", "--solver", solver, "--out", path)[0] == 0
    assert call(capsys, "verify", path, "--repeats", "1")[0] == 0


def test_a_trunk_is_planned(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    # Of the size that test_every_model_runs has traced.
    flags = ["--model", "alphafold2-trunk", *TINY_FLAGS["alphafold2-trunk"], "--n-seq", "5", "--n-res", "9"]
    code, out, _ = call(capsys, "plan", *flags, "--memory", "100MB", "--out", path)
    assert code == 0
    assert "extra.row_attention" in out
    assert "main.pair_transition" in out
    assert call(capsys, "verify", path, "--simulate")[0] == 0
    code, _, err = call(capsys, "plan", *SMALL, "--n-extra", "9")
    assert code == 2
    assert "alphafold2-trunk" in err


def test_steps_that_offer_nothing_but_whole_are_named(capsys: pytest.CaptureFixture) -> None:
    """One sequence and one head: row attention has nothing to cut."""
    code, out, _ = call(capsys, "plan", "--model", "alphafold2", "--n-blocks", "1", "--n-seq", "1",
                        "--n-res", "1", "--memory", "100MB")  # fmt: skip
    assert code == 0
    assert "never in pieces" not in out  # heads can still be cut


@pytest.mark.parametrize("solver", ["cp-sat", "seed-dp", "dp"])
def test_the_least_budget_named_is_enough(capsys: pytest.CaptureFixture, tmp_path: Path, solver: str) -> None:
    path = tmp_path / "least.json"
    flags = ["plan", *SMALL, "--solver", solver]
    assert call(capsys, *flags, "--memory", "100kB", "--json", str(path))[0] == 3
    least = json.loads(path.read_text())["least_feasible_bytes"]
    assert call(capsys, *flags, "--memory", str(least))[0] == 0
    assert call(capsys, *flags, "--memory", str(least - 1))[0] == 3


def test_inference_plans_simulate_with_dropout_in_the_model(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    assert call(capsys, "plan", *SMALL, "--mode", "inference", "--out", path)[0] == 0
    assert call(capsys, "verify", path, "--simulate")[0] == 0


def test_inference_says_what_waits_on_the_host(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """At the least budget of a device, not of the CPU; the whole run agrees, and a shorter one."""
    path = tmp_path / "plan.json"
    flags = ["plan", *SMALL, "--n-res", "25", "--mode", "inference", "--memory"]
    least = {}
    for device in ("a100-40gb", "cpu"):
        assert call(capsys, *flags, "1kB", "--device", device, "--json", str(path))[0] == 3
        least[device] = json.loads(path.read_text())["least_feasible_bytes"]
        code, out, _ = call(
            capsys, *flags, str(least[device]), "--device", device, "--json", str(tmp_path / device),
            "--out", str(path),
        )  # fmt: skip
        assert code == 0
        assert ("on the host" in out) == (device != "cpu")
        assert json.loads(path.read_text())["solver"]["gap"] == 0
    plan = str(tmp_path / "a100-40gb")
    code, out, _ = call(capsys, "show", plan)
    assert code == 0
    assert re.search(r"blocks\.1\.triangle_outgoing: .*\[on the host: m\]", out)
    assert "copies between the device and the host" in out
    assert call(capsys, "verify", plan, "--simulate")[0] == 0
    assert call(capsys, "verify", plan, "--simulate", "--blocks", "1")[0] == 0
    assert call(capsys, "verify", plan, "--repeats", "1")[0] == 0


def test_device_plans_keep_the_least_budget(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Blocks of 512 bytes: the loss's few numbers take one each."""
    path = tmp_path / "plan.json"
    flags = ["plan", *SMALL, "--device", "a100-40gb"]
    assert call(capsys, *flags, "--memory", "100kB", "--json", str(path))[0] == 3
    least = json.loads(path.read_text())["least_feasible_bytes"]
    assert call(capsys, *flags, "--memory", str(least), "--out", str(path))[0] == 0
    assert call(capsys, "verify", str(path), "--simulate")[0] == 0


@pytest.mark.parametrize("flags", [
    ["plan", *SMALL, "--memory", "9" * 400 + "GiB"], ["plan", *SMALL, "--memory", "9" * 30 + "GiB"],
    ["plan", *SMALL, "--out", "/dev/null"], ["plan", *SMALL, "--n-extra", "4"],
])  # fmt: skip
def test_more_bad_input_is_one_line(capsys: pytest.CaptureFixture, flags: list[str]) -> None:
    code, _, err = call(capsys, *flags)
    assert code == 2
    assert err.count("\n") == 1
