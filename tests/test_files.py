"""Files: refused before the work where they cannot be written, and then all of it or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from evoplan.planner.commands.cli import main
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.files import check_writable, lock_folder, picture_format, write_json, write_text
from evoplan.planner.plans.plan import load_plan
from tests.test_cli import call

TINY = ["--model", "alphafold2-narrow", "--n-blocks", "1", "--n-seq", "2", "--n-res", "3"]
TINY += ["--c-m", "8", "--c-z", "8"]
QUICK = [*TINY, "--mode", "inference"]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    main(["plan", *TINY, "--out", str(path)])
    return path


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with everything in it that is no ordinary file, and some that are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo("fifo")
    Path("to-fifo").symlink_to("fifo")
    Path("to-folder").symlink_to("folder")
    Path("loop").symlink_to("loop")
    Path("to-nowhere").symlink_to("no/such/file")
    Path("file").write_text("old")
    Path("link").symlink_to("file")
    Path("hard").hardlink_to("file")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "is a folder"),
        ("folder", "is a folder"),
        ("to-folder", "is a folder"),
        ("fifo", "is not an ordinary file"),
        ("to-fifo", "is not an ordinary file"),
        ("/dev/null", "is not an ordinary file"),
        ("no/file", r"folder .*/no does not exist"),
        ("to-nowhere", r"folder .*/no/such does not exist"),
        ("file/file", r"cannot be written \(Not a directory\)"),
        ("loop", r"cannot be written \(Too many levels of symbolic links\)"),
        ("x" * 300, r"cannot be written \(File name too long\)"),
    ],
)
def test_what_cannot_be_written(odd: Path, path: str, says: str) -> None:
    for given in ({"json_path": path}, {}):
        with pytest.raises(ValueError, match=says) as caught:
            check_writable(*([] if given else [path]), **given)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("path", ["file", "./file", "folder/../file", "link", "hard", "to-folder/../file"])
def test_what_is_read_is_not_written_over(odd: Path, path: str) -> None:
    for read in ("file", str(odd / "file"), "link"):
        with pytest.raises(ValueError, match=f"{path}: is read as {read}, and would be overwritten"):
            check_writable(json_path=path, reads=(None, read))
        with pytest.raises(ValueError, match=f"{read}: is the same file as {path}"):
            check_writable(path, json_path=read)


def test_what_can_be_written(odd: Path) -> None:
    check_writable("new", None, "file", json_path="-", reads=("other", None, "-"))
    check_writable("folder/file", json_path="new", reads=("file",))
    with pytest.raises(ValueError, match="only --json - is standard output"):
        check_writable("-")


def test_links_are_followed_and_permissions_kept(odd: Path) -> None:
    Path("file").chmod(0o640)
    write_json("link", {"a": 1})
    assert Path("link").is_symlink()
    assert json.loads(Path("file").read_text()) == {"a": 1}
    assert stat.S_IMODE(Path("file").stat().st_mode) == 0o640
    assert Path("hard").read_text() == "old"  # a new file took the name
    Path("to-new").symlink_to("folder/new")
    write_text("to-new", "text")
    assert Path("folder/new").read_text() == "text"
    assert stat.S_IMODE(Path("folder/new").stat().st_mode) == 0o666 & ~_umask()
    write_text("é" * 120, "text")  # as long as names may be
    assert not list(odd.rglob(".*"))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_full_disk_leaves_the_old_file(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: 'file'"):
        write_text("file", "new")
    assert Path("file").read_text() == "old"
    assert not list(odd.rglob(".*"))


def test_what_is_no_ordinary_file_stays(tmp_path: Path) -> None:
    """A device or a pipe: a plan that is saved there must not take its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not an ordinary file"):
        write_text(pipe, "plan")
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


def test_picture_formats() -> None:
    assert [picture_format(name) for name in ("a.PNG", "a", "a.svg", "b.pdf")] == ["png", "png", "svg", "pdf"]
    with pytest.raises(ValueError, match=r"a\.gif: pictures are written as png, svg or pdf, not 'gif'"):
        picture_format("a.gif")


READ, ODD = "and would be overwritten", "is not an ordinary file"


@pytest.mark.parametrize(
    ("says", "command"),
    [
        (ODD, "plan --out fifo"),
        ("only --json - is standard output", "plan --out -"),
        ("is a folder", "plan --json to-folder"),
        ("is the same file as new", "plan --out new --json ./new"),
        (READ, "plan --msa file --out hard"),
        (ODD, "sweep --plot /dev/null"),
        ("pictures are written as png, svg or pdf", "sweep --plot picture.gif"),
        (READ, "sweep --cache file --out link"),
        (ODD, "profile --save-device fifo"),
        (READ, "profile --cache file --save-device hard"),
        (READ, "roofline --device device.json --json device.json"),
        (READ, "show file --json file"),
        (READ, "show other --cache file --json link"),
        (READ, "verify file --json folder/../file"),
        (READ, "run file --json hard"),
        (READ, "run other --msa file --json link"),
    ],
)
def test_commands_refuse_before_the_work(
    odd: Path, capsys: pytest.CaptureFixture, says: str, command: str
) -> None:
    """Which at these sizes would take minutes."""
    code, out, error = call(capsys, *command.split())
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert says in error
    assert Path("file").read_text() == "old"


def test_json_to_standard_output(
    plan_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing else is there, so that it can be piped."""
    monkeypatch.chdir(tmp_path)
    for flags, key, words in (
        (["plan", *QUICK, "--out", "p.json"], "digest", "plan written to p.json"),
        (["show", str(plan_file)], "timeline", "memory timeline"),
        (["verify", str(plan_file), "--simulate"], "ok", "verification (simulated)"),
        (["run", str(plan_file), "--steps", "1"], "losses", "step 1: masked-MSA loss"),
    ):
        code, out, error = call(capsys, *flags, "--json", "-")
        assert code == 0
        assert key in json.loads(out)
        assert words in error
    code, out, _ = call(capsys, "plan", *QUICK, "--memory", "1kB", "--json", "-")
    assert code == 3
    assert json.loads(out)["least_feasible_bytes"] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]  # and no file of that name


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_output_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`evoplan plan --out p.json | head -1`, both streams."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, os.fdopen(_closed_pipe(), "w", buffering=1))
    main(["plan", *QUICK, "--out", str(tmp_path / "p.json")])  # raises no SystemExit: code 0
    assert load_plan(tmp_path / "p.json").problem.config.n_block == 1
    with pytest.raises(SystemExit) as stop:  # other codes stay what they are
        main(["plan", "--memory", "lots"])
    assert stop.value.code == 2


PRINTS = """
import click
from evoplan.planner.commands.terminal import run_command
@click.command()
def much():
    for line in range({lines}):
        print(line)
    click.echo("end")
run_command(much, "much")
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_no_error(lines: int) -> None:
    """Not when the interpreter ends either, with what is left in its buffers."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(lines=lines)], stdout=_closed_pipe(), stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, PRINTS.format(lines=lines)],
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("code", [0, 1])
def test_a_full_disk_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, code: int
) -> None:
    @click.command()
    def much() -> None:
        click.echo("words")
        sys.exit(code)

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            run_command(much, "much", [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "much: /dev/full: No space left on device\n"


LOCKS = """
import sys, time
from pathlib import Path
from evoplan.planner.files import lock_folder
held = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCKS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert lock_folder(tmp_path) is None
        process.send_signal(signal.SIGKILL)
    held = lock_folder(tmp_path)
    assert held is not None
    assert lock_folder(tmp_path) is None
    held.close()
    assert not list(tmp_path.iterdir())
    again = lock_folder(tmp_path)
    assert again is not None
    again.close()


def test_a_lock_on_a_file_that_was_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder lets it go between our opening and locking: the file then is no longer the folder's."""
    held, flock = lock_folder(tmp_path), fcntl.flock
    assert held is not None

    def late(*arguments: Any) -> None:
        held.close()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    ours = lock_folder(tmp_path)
    assert ours is not None
    assert lock_folder(tmp_path) is None
    ours.close()


def test_one_run_writes_snapshots(plan_file: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """A folder that another run holds is refused, and left alone; one that it left is gone on with."""
    folder = tmp_path / "snapshots"
    flags = ["run", str(plan_file), "--snapshots", str(folder), "--save-every", "1"]
    unfinished = folder / ".unfinished-1"
    unfinished.mkdir(parents=True)
    held = lock_folder(folder)
    assert held is not None
    code, _, error = call(capsys, *flags, "--steps", "1")
    assert code == 2
    assert error == (
        f"evoplan: {folder}: another run writes its snapshots here; wait for its end or name another folder\n"
    )
    assert unfinished.exists()
    held.close()
    assert call(capsys, *flags, "--steps", "1")[0] == 0
    assert not unfinished.exists()
    code, _, error = call(capsys, *flags, "--steps", "2")  # which holds it only as long as it takes to refuse
    assert (code, "add --resume" in error) == (2, True)
    assert call(capsys, *flags, "--steps", "2", "--resume")[0] == 0
