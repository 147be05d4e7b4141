"""The watch that each rank keeps on the others, so that a run which cannot go on ends everywhere, in one line
that names whoever ended it.

It is a thread of its own, since the main one may hang in a collective: it beats in the launcher's store,
follows the beat of the next rank (in a ring: some rank that lives watches a rank that does not), and hears
SIGTERM, which torchrun sends to the others as soon as one rank dies. Whoever notices something raises the
alarm; everyone answers it; after a moment who has not answered is known, and so is who failed by itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]

from evoplan.planner.sizes import format_seconds

BEAT_SECONDS = 0.5
SILENCE = "no sign of life"
GRACE_SECONDS = 4.0  # in which ranks answer an alarm; torchrun kills 30 s after it has sent SIGTERM

# By itself; in a collective, as those do whose partner has gone; all alike, in a line that names who; or
# because somebody outside ended it.
Kind = Literal["own", "collective", "common", "signal"]


@dataclass(frozen=True)
class Member:
    """A rank's process.

    Attributes:
        machine: tells whether the process can be seen from another rank: kernel and name space of processes.
    """

    rank: int
    pid: int = 0
    host: str = ""
    machine: str = ""

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            machine = ""
        return cls(rank, os.getpid(), socket.gethostname(), machine)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}, {self.host})" if self.pid else f"rank {self.rank}"


@dataclass(frozen=True)
class Failure:
    """What a rank says of its own end. Attributes: order: of the failures, which came first."""

    order: int
    kind: Kind
    text: str
    code: int


def verdict(
    members: Mapping[int, Member],
    failures: Mapping[int, Failure],
    answered: Collection[int],
    dead: Collection[int],
    final: bool,
    alarm: str,
) -> tuple[str, int] | None:
    """The line that says who ended the run, and the exit code; None: wait for more.

    Args:
        members: all ranks.
        answered: who has answered the alarm.
        dead: whose process is known to be gone.
        final: there is no more time to wait.
        alarm: why it was raised.
    """
    told = sorted((f.order, rank) for rank, f in failures.items() if f.kind in ("own", "common"))
    if told:
        rank = told[0][1]
        failure = failures[rank]
        who = "" if failure.kind == "common" else f"{members[rank]}: "
        return who + failure.text, failure.code
    if dead:
        return f"{_list(members, dead)} died without a word: killed, or out of memory", 1
    missing = set(members) - set(answered)
    if missing:
        why = alarm.partition(" from ")[0] if alarm.startswith(SILENCE) else "it died or hangs"
        return (f"{_list(members, missing)} does not answer: {why}", 1) if final else None
    stuck = {rank: f for rank, f in failures.items() if f.kind == "collective"}
    if stuck and len(stuck) < len(members):
        late = set(members) - set(stuck)
        return (f"{_list(members, late)} does not take part: the others waited in vain", 1) if final else None
    if stuck:
        rank = min(stuck, key=lambda rank: stuck[rank].order)
        return f"{members[rank]}: {stuck[rank].text}", 1
    return alarm, 1


def _list(members: Mapping[int, Member], ranks: Collection[int]) -> str:
    return ", ".join(str(members[rank]) for rank in sorted(ranks))


class Watch(threading.Thread):
    """One rank's watch. Call `start` on the main thread, and `stop` when the work is done.

    Args:
        store: a connection of its own.
        seconds: of silence after which a rank counts as hanging.
    """

    def __init__(self, store: Store, rank: int, size: int, seconds: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size, self.seconds = store, rank, size, seconds
        self.members = {other: Member(other) for other in range(size)}
        self._handles: dict[int, int] = {}  # of other processes on this machine; their numbers may be reused
        self._gone: set[int] = set()  # whose process had ended and been reaped before a handle was taken
        self._next = (rank + 1) % size
        self._last_beat, self._heard = b"", time.monotonic()
        self._stopped = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def start(self) -> None:
        """Join the ring, and hear SIGTERM instead of dying of it."""
        self.store.set(f"who/{self.rank}", json.dumps(asdict(Member.here(self.rank))))
        # The interpreter's own handler may wait for a collective to return; this wakes the thread at once.
        self._previous_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._previous = signal.signal(signal.SIGTERM, lambda *_: None)
        super().start()

    def know(self) -> None:
        """Learn who the others are; those that have not joined stay numbers."""
        for rank in self._posted("who"):
            self.members[rank] = Member(**json.loads(self.store.get(f"who/{rank}")))
        mine = self.members[self.rank].machine
        for rank, member in self.members.items():
            if rank not in {*self._handles, self.rank} and mine and member.machine == mine:
                try:
                    self._handles[rank] = os.pidfd_open(member.pid)
                except ProcessLookupError:
                    self._gone.add(rank)
                except OSError:
                    continue  # it cannot be seen from here, and its silence has to tell

    def stop(self) -> None:
        """End the watch; the run has gone well."""
        self._stopped = True
        self.store.set(f"done/{self.rank}", "1")
        self._wake()
        self.join()
        signal.set_wakeup_fd(self._previous_wakeup)
        signal.signal(signal.SIGTERM, self._previous)

    def fail(self, kind: Kind, text: str, code: int) -> NoReturn:
        """End the run on all ranks for a reason of this rank's; the thread ends this process."""
        with suppress(Exception):  # without the store the thread ends the process as well
            failure = Failure(self.store.add("order", 1), kind, text, code)
            self.store.set(f"failed/{self.rank}", json.dumps(asdict(failure)))
            self.store.compare_set("alarm", "", "a collective failed")
        self._wake()
        self.join()
        os._exit(code)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def run(self) -> None:
        """The thread."""
        try:
            while not self._stopped:
                self.store.set(f"beat/{self.rank}", repr(time.monotonic()))
                alarm = self._alarm()
                if alarm is not None:
                    self._conclude(alarm)
        except Exception as error:
            if not self._stopped:
                self._leave(
                    f"rank {self.rank}: the launcher's store does not answer ({first_line(error)})", 1
                )

    def _alarm(self) -> str | None:
        """Wait a moment; why to end the run, if there is a reason."""
        ready, _, _ = select.select([self._wake_read], [], [], BEAT_SECONDS)
        signals = set(os.read(self._wake_read, 64)) if ready else set()
        if self._stopped:
            return None
        if self.store.check(["alarm"]):
            return self.store.get("alarm").decode()
        for number in (signal.SIGTERM, signal.SIGINT):
            if number in signals:
                return f"ended by {number.name}"
        if self.store.check([f"beat/{self._next}"]):
            beat = self.store.get(f"beat/{self._next}")
            if beat != self._last_beat:
                self._last_beat, self._heard = beat, time.monotonic()
            silent = time.monotonic() - self._heard
            if silent > self.seconds and not self.store.check([f"done/{self._next}"]):
                return f"{SILENCE} for {format_seconds(silent)} from rank {self._next}"
        return None

    def _conclude(self, alarm: str) -> NoReturn:
        """Answer the alarm, find out who ended the run, say so, and end this process."""
        self.store.compare_set("alarm", "", alarm)
        self.store.set(f"here/{self.rank}", "1")
        self.know()
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            final = time.monotonic() > deadline
            # First who has ended: then its words.
            dead = self._gone | {rank for rank, handle in self._handles.items() if _ended(handle)}
            dead -= self._posted("done")
            failures = {
                rank: Failure(**json.loads(self.store.get(f"failed/{rank}")))
                for rank in self._posted("failed")
            }
            answered = self._posted("here") | set(failures)
            found = verdict(self.members, failures, answered, dead - answered, final, alarm)
            if found is not None:
                break
            time.sleep(0.05)
        for rank, handle in self._handles.items():
            if final and rank not in answered:  # it hangs: the launcher would wait 30 s for it
                with suppress(OSError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        # One rank speaks; the others leave when it has, since torchrun ends all as soon as one has left.
        said = False
        if self.store.add("speakers", 1) > 1:
            with suppress(Exception):
                self.store.wait(["said"], timedelta(seconds=2))
                said = True
        self._leave(None if said else found[0], found[1])

    def _posted(self, what: str) -> set[int]:
        return {rank for rank in range(self.size) if self.store.check([f"{what}/{rank}"])}

    def _leave(self, line: str | None, code: int) -> NoReturn:
        with suppress(Exception):
            sys.stdout.flush()
            if line is not None:
                print(f"evoplan: {' '.join(line.split())}", file=sys.stderr, flush=True)
                self.store.set("said", "1")
        os._exit(code)  # the main thread may never return


def _ended(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0)[0])


def first_line(error: BaseException) -> str:
    """Of what an error says: torch's own say more than people can use."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
