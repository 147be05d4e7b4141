"""Python processes that start at once: forks of one that has torch and evoplan loaded already.

Loading them takes seconds, and a hundred tests want a process of its own. A fork is one like any other: it
has its own output and exit code, may be killed, and leaves nothing behind. The process that is forked has no
threads and computes nothing. It ends with the one that asked for it, and is started anew should it die.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
LOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.fx.experimental.symbolic_shapes",  # fake tensors load it when first used
    "matplotlib.pyplot",
    "evoplan.planner.commands.cli",
    "evoplan.planner.plans.planning",
    "evoplan.planner.runs.run",
    "evoplan.planner.runs.snapshots",
    "evoplan.planner.checking.verify",
    "evoplan.planner.processes.world",
    "evoplan.experiments.tiny_openfold.run",
    "evoplan.experiments.tiny_openfold.setup",
    "evoplan.experiments.flops.single",
    "evoplan.experiments.flops.several",
    "evoplan.experiments.scaling",
    "hypothesis",
    "pytest",
)
LENGTH = 8  # bytes of a number on the way from the warm process


class Child:
    """A forked process, as far as tests need it in the words of subprocess.Popen.

    Args:
        arguments: as python's: `-m` and a module, `-c` and code, or a script; and what follows.
        stdout, stderr: descriptors to write to; without them it has pipes of its own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stdout, out = _output(stdout)
        self.stderr, err = _output(stderr)
        status, write = os.pipe()
        request = json.dumps({"arguments": [*arguments], "environment": {**environment}, "cwd": os.getcwd()})
        try:
            _ask(request.encode(), [write, out, err])
        finally:
            for fd, ours in ((write, True), (out, stdout is None), (err, stderr is None)):
                if ours:
                    os.close(fd)
        self._status = open(status, "rb", buffering=0)  # noqa: SIM115
        self.pid = int.from_bytes(self._status.read(LENGTH), "little")
        assert self.pid, "the warm process has died"

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._poll(0)

    def _poll(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            said = self._status.read(LENGTH)
            self.returncode = int.from_bytes(said, "little", signed=True) if said else -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        code = self._poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it writes until it ends."""
        assert self.stdout is not None
        assert self.stderr is not None
        reader = Reader(self.stdout, self.stderr)
        self.wait(timeout)
        return reader.text(timeout)

    def send_signal(self, number: int) -> None:
        """As kill does, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """It has to be gone when a test is, and all of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)
        for file in (self.stdout, self.stderr, self._status):
            if file is not None:
                file.close()


def _output(given: int | None) -> tuple[TextIO | None, int]:
    if given is not None:
        return None, given
    read, write = os.pipe()
    return open(read, encoding="utf-8", errors="replace"), write


class Reader:
    """Reads several files at once, so that nobody waits for a full pipe."""

    def __init__(self, *files: TextIO) -> None:
        self._texts = [""] * len(files)
        self._threads = [
            threading.Thread(target=self._read, args=about, daemon=True) for about in enumerate(files)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int, file: TextIO) -> None:
        self._texts[number] = file.read()

    def text(self, timeout: float) -> tuple[str, ...]:
        """All that was written, once nobody can write any more."""
        for thread in self._threads:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired("reading its output", timeout)
        return tuple(self._texts)


_control: socket.socket | None = None


def _ask(request: bytes, fds: list[int]) -> None:
    """Send a request to the warm process, which may have to be started for it."""
    global _control
    if _control is not None:
        with suppress(OSError):
            socket.send_fds(_control, [request], fds)
            return
    _control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno())], env=environment,
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
    socket.send_fds(_control, [request], fds)


# --- the warm process -----------------------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork for every request; returns in the forks, each with its own. Ends when nobody can ask any more."""
    running: dict[int, tuple[int, int]] = {}  # a handle on each process: its number, and who waits for it
    while True:
        for handle in select.select([control, *running], [], [])[0]:
            if handle is not control:
                pid, waiting = running.pop(handle)
                _, status = os.waitpid(pid, 0)
                _tell(waiting, os.waitstatus_to_exitcode(status))
                os.close(waiting)
                os.close(handle)
                continue
            message, fds, _, _ = socket.recv_fds(control, 2**20, 3)
            if not message:
                os._exit(0)
            waiting, *outputs = fds
            assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
            pid = os.fork()
            if pid == 0:
                control.close()
                for fd in (*running, *(other for _, other in running.values()), waiting):
                    os.close(fd)
                for fd, standard in zip(outputs, (1, 2), strict=True):
                    os.dup2(fd, standard)
                    os.close(fd)
                return json.loads(message)
            for fd in outputs:
                os.close(fd)
            running[os.pidfd_open(pid)] = pid, waiting
            _tell(waiting, pid)


def _tell(waiting: int, number: int) -> None:
    with suppress(BrokenPipeError):
        os.write(waiting, number.to_bytes(LENGTH, "little", signed=True))


def become(arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Run what python would be started with."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    match arguments:
        case "-m", module, *_:
            sys.argv = arguments[1:]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case "-c", code, *_:
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case script, *_:
            sys.argv = arguments
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")


def main() -> None:
    """The warm process, and whatever becomes of its forks."""
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
