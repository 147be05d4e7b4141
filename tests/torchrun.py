"""Running the command line in processes of its own, one or several as under torchrun, within a hard limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from tests.warm import Child, Reader

ROOT = Path(__file__).parents[1]
FAULTY = str(ROOT / "tests" / "faulty.py")


@dataclass
class Done:
    """How a run ended, and when (time.time())."""

    code: int
    out: str
    err: str
    ended: float

    @property
    def lines(self) -> list[str]:
        """What evoplan itself said of its end."""
        return [line for line in self.err.splitlines() if line.startswith("evoplan: ")]


def torchrun_command(size: int, *arguments: str) -> list[str]:
    """What starts `arguments` (a script or `-m evoplan.planner`, and what follows) on `size` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return [sys.executable, *launcher, *arguments]


def torchrun(size: int, *arguments: str, seconds: float = 240) -> Done:
    """Run `arguments` as above."""
    with started(torchrun_command(size, *arguments)) as process:
        out, err = process.communicate(timeout=seconds)
        return Done(process.returncode, out, err, time.time())


def launched(size: int, *arguments: str, seconds: float = 240) -> Done:
    """The same without waiting for torchrun and `size` times for torch: ranks are forks (`tests/warm.py`).

    What torchrun itself says is missing. Like it, this ends all ranks once one has failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun holds it, too
    common = {
        **environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    (out, write_out), (err, write_err) = os.pipe(), os.pipe()
    with ExitStack() as stack:
        files = [stack.enter_context(open(fd, encoding="utf-8", errors="replace")) for fd in (out, err)]
        try:
            ranks = []
            for rank in map(str, range(size)):
                about = {**common, "RANK": rank, "LOCAL_RANK": rank}
                ranks.append(stack.enter_context(closing(Child(arguments, about, write_out, write_err))))
        finally:
            os.close(write_out)
            os.close(write_err)
        reader, deadline = Reader(*files), time.monotonic() + seconds
        failed = False
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(arguments, seconds)
            if not failed and any(rank.poll() for rank in ranks):
                failed = True
                deadline = min(deadline, time.monotonic() + 30)
                for rank in ranks:
                    rank.terminate()
            time.sleep(0.02)
        ended = time.time()
        code = max(abs(rank.wait()) for rank in ranks)
        return Done(code, *reader.text(seconds), ended)


def alone(*arguments: str, seconds: float = 240) -> Done:
    """Run `arguments` as above on one process, a fork."""
    with forked(*arguments) as process:
        out, err = process.communicate(seconds)
        return Done(process.wait(), out, err, time.time())


@contextmanager
def forked(*arguments: str) -> Iterator[Child]:
    """`arguments` as above running on one process, which is killed at the end."""
    with closing(Child(arguments, environment())) as process:
        yield process


def environment() -> dict[str, str]:
    """What processes are started in."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, killed at the end; ranks, in theirs, end with torchrun."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
