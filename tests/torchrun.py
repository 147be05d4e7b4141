"""Running the command line in processes of its own, alone or under torchrun, within a hard time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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


def torchrun(size: int, *arguments: str, seconds: float = 120) -> Done:
    """Run `arguments` as above."""
    return run(torchrun_command(size, *arguments), seconds)


def alone(*arguments: str, seconds: float = 120) -> Done:
    """Run `arguments` as above on one process, without torchrun."""
    return run([sys.executable, *arguments], seconds)


def run(command: Sequence[str], seconds: float) -> Done:
    """Run a command to its end, which it has to come to in time."""
    with started(command) as process:
        out, err = process.communicate(timeout=seconds)
        return Done(process.returncode, out, err, time.time())


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, killed at the end; ranks, in theirs, end with torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
