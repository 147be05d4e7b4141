"""Running the command line in processes of its own, alone or under torchrun, within a hard time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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


def torchrun(size: int, *arguments: str, seconds: float = 90) -> Done:
    """`arguments` (a script or `-m planner`, and what follows) on `size` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return run([sys.executable, *launcher, *arguments], seconds)


def alone(*arguments: str, seconds: float = 60) -> Done:
    """`arguments` as above on one process, without torchrun."""
    return run([sys.executable, *arguments], seconds)


def run(command: Sequence[str], seconds: float) -> Done:
    """A command in a session of its own, killed with all that it started when the time is up."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Done(process.returncode, out, err, time.time())
