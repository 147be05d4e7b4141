"""Running a function on several ranks: processes over gloo that end within a stated time, come what may."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.torchrun import environment
from tests.warm import Child


def on_ranks(size: int, function: Callable[..., Any], *args: Any, seconds: float = 480) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; RuntimeError holds what the ranks raised.

    The function must be importable by name: every rank is a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder)
        (path / "job").write_bytes(pickle.dumps((function, args)))
        nowhere = stack.enter_context(open(os.devnull, "w")).fileno()
        ranks = [
            stack.enter_context(
                closing(
                    Child(
                        ["-m", "tests.ranks", folder, str(rank), str(size), str(seconds)],
                        environment(),
                        nowhere,
                        nowhere,
                    )
                )
            )
            for rank in range(size)
        ]
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
        failures = [failed.read_text() for failed in sorted(path.glob("failed-*"))]
        if failures or any(rank.poll() != 0 for rank in ranks):
            raise RuntimeError("\n".join(failures) or f"ranks did not end within {seconds} seconds")
        return [torch.load(path / f"result-{rank}") for rank in range(size)]


def _rank(folder: Path, rank: int, size: int, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        function, args = pickle.loads((folder / "job").read_bytes())
        # A file and no port: ports may be taken by the time they are used.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds / 2),
        )
        torch.save(function(*args), folder / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
