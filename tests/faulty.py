"""evoplan, but one rank does what no rank should: FAULT RANK STEP, then the usual arguments."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from evoplan.planner.commands.cli import main
from evoplan.planner.runs import snapshots, training


def breaking(fault: str, at: int):
    """Training's step, which breaks when it is called for the `at`-th time."""
    whole, calls = training.Training.step, 0

    def step(self, batch, dropout_seed):
        nonlocal calls
        calls += 1
        if calls != at:
            return whole(self, batch, dropout_seed)
        print(f"fault at {time.time()}", flush=True)
        match fault:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "stuck":
                time.sleep(3600)
            case "bug":
                raise TypeError("two and two are five")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand so on")
            case "exit":
                os._exit(3)
            case "nan":
                return whole(self, batch, dropout_seed) * float("nan")
            case "drift":
                with torch.no_grad():
                    next(iter(self.parameters.values())).view(-1)[0] += 1e-3
        return whole(self, batch, dropout_seed)

    return step


def saving(at: int):
    """The last write of a snapshot before it is complete; the `at`-th one kills."""
    whole, calls = snapshots.write_json, 0

    def write_json(path, document):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, document)

    return write_json


if __name__ == "__main__":
    fault, rank, at, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        if fault == "killed-saving":
            snapshots.write_json = saving(int(at))
        else:
            training.Training.step = breaking(fault, int(at))
    main(arguments)
