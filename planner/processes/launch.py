"""A program that starts itself again on every GPU, as torchrun would."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch


def gpus_to_share() -> int:
    """GPUs that this process could share its work among: 1 under torchrun, which has given each its own."""
    return 1 if "RANK" in os.environ else max(1, torch.cuda.device_count())


def start_on_gpus(module: str, arguments: Sequence[str], count: int) -> None:
    """Go on as torchrun with a process for each GPU; does not return.

    CUDA_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES say which GPUs there are.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execv(sys.executable, [*command, "-m", module, *arguments])
