"""Peers by name: what each is, where it comes from, and how it is put on a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from evoplan.model.running.chain import Plannable
from evoplan.planner.problems.costing import Costed

Unit = Literal["bytes", "fraction"]
Kind = Literal["hand", "automatic", "ours"]
# Shares of the plain model's peak that are asked for where a budget is in bytes.
SHARES = (0.1, 0.2, 0.35, 0.6)


class UnavailableError(Exception):
    """A peer cannot be had here; the message is its one-line reason."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a peer is put on.

    Attributes:
        stack: the model; its parameters are shared by all that are compared.
        costed: the problem with its cost table, in measured times.
        plain_peak_bytes: measured peak of the plain model above what is live before a step.
        static_bytes: live before a step, the optimizer's states and the workspace included.
        peak_of: measures a module's peak above static, in bytes.
        inputs: forward's arguments by name.
    """

    stack: Plannable
    costed: Costed
    plain_peak_bytes: int
    static_bytes: int
    peak_of: Callable[[nn.Module], int]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Blocks of the stack."""
        return len(self.costed.table.groups)


# (what it is put on, the budget: bytes above static, a fraction, or None) -> a module called as the stack.
Apply = Callable[[Setting, float | None], nn.Module]


@dataclass(frozen=True, eq=False)
class Peer:
    """A way to train in less memory.

    Attributes:
        name: as `--only` takes it.
        about: what it does, in a line.
        source: paper, documentation or package.
        kind: whether somebody chooses by hand, a program does, or evoplan.
        apply: puts it on a model: raises ImportError or UnavailableError, with the reason, where it cannot.
        unit: of its budget; None where it takes none.
        budgets: that it is asked for: fractions, or shares of the plain model's peak.
    """

    name: str
    about: str
    source: str
    kind: Kind
    apply: Apply
    unit: Unit | None = None
    budgets: tuple[float, ...] = ()

    def askings(self) -> Iterator[float | None]:
        """Its budgets one by one; None alone where it takes none."""
        yield from self.budgets if self.unit else (None,)

    def budget(self, asked: float | None, plain_peak_bytes: int) -> float | None:
        """What `apply` is given for an asking."""
        return asked if asked is None or self.unit == "fraction" else int(asked * plain_peak_bytes)


_PEERS: dict[str, Peer] = {}


def register(*peers: Peer) -> None:
    """Add peers; a name is taken once."""
    for peer in peers:
        if peer.name in _PEERS:
            raise ValueError(f"there is a peer {peer.name!r} already")
        _PEERS[peer.name] = peer


def all_peers() -> dict[str, Peer]:
    """Those that are there, in the order of the table."""
    from evoplan.experiments.peers import kinds

    kinds.load()
    return dict(_PEERS)


def chosen(names: Iterable[str] | None) -> list[Peer]:
    """The peers of these names in the order of the table; all of them if None.

    Raises:
        ValueError: there is none of a name; lists those that there are.
    """
    peers = all_peers()
    if names is None:
        return list(peers.values())
    wanted = set(names)
    for name in sorted(wanted - set(peers)):
        raise ValueError(f"unknown peer {name!r}; choose of: {', '.join(peers)}")
    return [peer for name, peer in peers.items() if name in wanted]
