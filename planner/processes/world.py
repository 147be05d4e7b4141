"""The processes that torchrun started, from joining to leaving: one `with joined(...)` around a run.

Inside it no failure of any rank goes unanswered: what one raises, and its death or silence, ends the run on
all of them within the timeout and a few seconds, in one line that names it (`planner/processes/watch.py`).
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from evoplan.planner.errors import CommonError, RunError
from evoplan.planner.processes.identity import _code, odd_ones
from evoplan.planner.processes.watch import Kind, Watch, first_line

NCCL_SECONDS = 8  # more than the watch waits: NCCL ends a process without a word when a collective is late


# Backends raise plain errors where a partner is gone or late; these words are in them, not in others.
_OF_COLLECTIVES = ("gloo", "nccl", "tcpstore", "pair closure", "connection", "timed out", "broken pipe")


class World:
    """This process among the others; alone where there are none.

    Attributes:
        rank, size: of all processes; rank = replica x ranks of a replica + rank in it.
        local_rank, local_size: of those on this machine.
        works: sums of gradients that are under way.
        mesh: of replicas ("data") by the ranks of each ("dap"); None alone and before `connect`.
    """

    def __init__(self, timeout: float = 0.0) -> None:
        self.rank, self.size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self.local_rank, self.local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        self.timeout = timeout
        self.mesh: DeviceMesh | None = None
        self.watch: Watch | None = None
        self.store: Store | None = None
        self.holds_store = False
        self.device = torch.device("cpu")
        self.works: list[dist.Work] = []

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which replica this process belongs to."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def replicas(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of this process's replica."""
        return None if self.mesh is None else self.mesh.get_group("dap")

    @property
    def part(self) -> int:
        """This process's number among them."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("dap")

    def join(self) -> None:
        """Meet the other processes at the store; keep watch from here on. ValueError where there is none."""
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.holds_store = not agents and self.first
        # A restart by torchrun meets the keys of the run before.
        prefix = f"evoplan {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            self.store = PrefixStore(prefix, _client(self.timeout, self.holds_store))
            watched = PrefixStore(prefix, _client(self.timeout))
        except dist.DistError as error:
            raise ValueError(f"{first_line(error)}; start all ranks with torchrun") from None
        self.watch = Watch(watched, self.rank, self.size, self.timeout)
        self.watch.start()

    def agree(self, **identity: str) -> None:
        """Make sure that all ranks run the same: by code, torch, and whatever is given.

        Raises:
            CommonError: one differs, or does not come; the message names it.
        """
        identity = {"evoplan": _code(), "torch": torch.__version__, **identity}
        if self.size == 1:
            return
        assert self.store is not None
        assert self.watch is not None
        for what, value in identity.items():
            self.store.set(f"identity/{self.rank}/{what}", value)
        self.store.set(f"joined/{self.rank}", "1")
        waiting = [f"joined/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(waiting, timedelta(seconds=self.timeout))
        except dist.DistStoreError:
            late = [rank for rank in range(self.size) if not self.store.check([waiting[rank]])]
            names = ", ".join(f"rank {rank}" for rank in late)
            raise RunError(f"{names} did not join within {self.timeout:g} seconds") from None
        self.watch.know()
        for what in identity:
            values = {r: self.store.get(f"identity/{r}/{what}").decode() for r in range(self.size)}
            odd = odd_ones(values)
            if odd:
                names = ", ".join(f"{self.watch.members[rank]} has {values[rank]}" for rank in odd)
                usual = values[next(rank for rank in values if rank not in odd)]
                raise CommonError(
                    f"ranks differ in {what}: {names}, the others {usual}; start all with the same"
                )

    def connect(self, kind: str, replicas: int) -> None:
        """Set up communication among all processes.

        Args:
            kind: cpu (gloo) or cuda (NCCL; each rank has the GPU of its local number).
        """
        if kind == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"{torch.cuda.device_count()} GPUs here for {self.local_size} ranks; "
                    "start no more ranks than GPUs"
                )
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device("cuda", self.local_rank)
        if self.size == 1:
            return
        if self.local_size == self.size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
        seconds = self.timeout + (NCCL_SECONDS if kind == "cuda" else 0)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=seconds),
        )
        names = ("data", "dap")
        self.mesh = init_device_mesh(kind, (replicas, self.size // replicas), mesh_dim_names=names)

    def gathered(self, values: Tensor) -> Tensor:
        """Every rank's values [n], in rows [size, n]; on the CPU."""
        if self.mesh is None:
            return values.cpu().unsqueeze(0)
        values = values.to(self.device)
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows).cpu()

    def gathered_objects(self, value: Any) -> list[Any]:
        """Every rank's value, on all of them."""
        values = [value] * self.size
        if self.mesh is not None:
            dist.all_gather_object(values, value)
        return values

    def settle(self) -> None:
        """Wait until the threads that sum gradients have done all that belongs to a step.

        A future is done a little before its thread has closed its records. Who profiles the step must not
        stop in between: what is recorded then goes to memory that is no longer there.
        """
        for work in self.works:
            work.wait()
        self.works.clear()

    def barrier(self) -> None:
        """Wait for all."""
        if self.mesh is not None:
            dist.barrier()

    def name(self, rank: int) -> str:
        """A rank as people find it: its process and host."""
        return f"rank {rank}" if self.watch is None else str(self.watch.members[rank])

    def leave(self) -> None:
        """All have finished."""
        self.barrier()
        if self.watch is not None:
            self.watch.stop()
        if self.holds_store and self.store is not None:
            self.store.wait([f"done/{rank}" for rank in range(self.size)], timedelta(seconds=self.timeout))
        if self.mesh is not None:
            dist.destroy_process_group()


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """The world of this process; alone unless torchrun started several.

    Args:
        timeout: seconds that a collective may take, and that a rank may be silent.
    """
    world = World(timeout)
    if world.size == 1:
        yield world
        return
    world.join()
    assert world.watch is not None
    try:
        yield world
        world.leave()
    except BaseException as error:
        world.watch.fail(*_described(error))


def check_world(
    ranks: int, world: World, command: str, replicas: int = 1, agreed: Mapping[str, str] | None = None
) -> None:
    """Refuse a number of processes that the plan was not made for, and ranks that differ.

    Args:
        ranks: that the plan is for.
        command: what to start instead, after `evoplan` or torchrun.
        agreed: what else has to be the same on all ranks, by name.

    Raises:
        CommonError: says which number of processes is right, and how to start them.
    """
    world.agree(**(agreed or {}))
    wanted = ranks * replicas
    if world.size == wanted:
        return
    have = f"torchrun started {world.size} processes" if world.size > 1 else "this is 1 process"
    start = f"torchrun --nproc_per_node={wanted} -m evoplan.planner" if wanted > 1 else "evoplan"
    raise CommonError(
        f"the plan is for {ranks} rank{'s' * (ranks > 1)} in each of {replicas} "
        f"replica{'s' * (replicas > 1)}, {wanted} in all; {have}; use `{start} {command}`"
    )


def _described(error: BaseException) -> tuple[Kind, str, int]:
    """How a rank ends, what it says, and its exit code; prints the traceback of what nobody expects."""
    text = first_line(error)
    if isinstance(error, CommonError):
        return "common", text, 2
    if isinstance(error, RunError):
        return "common", text, 1
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_COLLECTIVES)
    ):
        return "collective", text, 1
    if isinstance(error, KeyboardInterrupt):
        return "common", "interrupted", 130
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "own", f"its memory is not enough ({text})", 1
    if isinstance(error, ValueError | OSError):
        return "own", text, 2
    traceback.print_exception(error, file=sys.stderr)
    return "own", f"{type(error).__name__}: {text}", 1


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _client(timeout: float, holds: bool = False) -> Store:
    """A connection to the launcher's store, or the store itself."""
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 29500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TCPStore(
            host, port, is_master=holds, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
