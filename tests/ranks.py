"""Running a function on several ranks: processes over gloo that end within a stated time, come what may."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(size: int, function: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; RuntimeError holds what the ranks raised.

    The function must be importable by name: every rank is a fresh process.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, size, folder, seconds, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failed-*"))]
        if failures or any(process.exitcode != 0 for process in processes):
            raise RuntimeError("\n".join(failures) or f"ranks did not end within {seconds} seconds")
        return [torch.load(Path(folder) / f"result-{rank}") for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, seconds: float, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        # A file and no port: ports may be taken by the time they are used.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds / 2),
        )
        torch.save(function(*args), Path(folder) / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        (Path(folder) / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
