"""Who holds what: versions of the state's tensors, and the steps that make and read them.

Every step makes new versions of some tensors and reads the current versions of some. A version is
alive from its making to its last reader; the outputs are read at the end. What a checkpoint must keep
on entry, what it leaves behind, and which gradients are live in backward all follow, and are asked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import networkx as nx

INPUT = -1  # the maker of the versions that the chain starts from


class Version(NamedTuple):
    """A tensor of the state as one step made it."""

    tensor: str
    maker: int


class Liveness:
    """The versions of a chain's state.

    Args:
        step_reads: for each step, the tensors it reads.
        outputs: the tensors whose last versions are wanted at the end; None for all.
        step_makes: for each step, the tensors that it makes anew; the first it reads if not given.
        donated: whether the versions that the chain starts from are its own, to write over and to let go.

    Attributes:
        graph: edges from each version to the steps that read it, and from each step to what it makes.
            Steps are numbers; the step after the last is whoever reads the outputs.
    """

    def __init__(
        self,
        step_reads: Iterable[tuple[str, ...]],
        outputs: Iterable[str] | None = None,
        step_makes: Iterable[tuple[str, ...]] | None = None,
        donated: bool = False,
    ) -> None:
        self.donated = donated
        step_reads = list(step_reads)
        makes_of = [reads[:1] for reads in step_reads] if step_makes is None else step_makes
        self.end = len(step_reads)
        names = dict.fromkeys(name for reads in step_reads for name in reads)
        current = {name: Version(name, INPUT) for name in names}
        self.graph = nx.DiGraph()
        for step, (reads, makes) in enumerate(zip(step_reads, makes_of, strict=True)):
            self.graph.add_node(step)
            self.graph.add_edges_from((current[name], step) for name in reads)
            current |= {name: Version(name, step) for name in makes}
            self.graph.add_edges_from((step, current[name]) for name in makes)
        wanted = names if outputs is None else outputs
        self.graph.add_node(self.end)
        self.graph.add_edges_from((current.get(name, Version(name, INPUT)), self.end) for name in wanted)

    @cached_property
    def _alive(self) -> list[tuple[Version, ...]]:
        """For each position between steps, the versions made before and read after it."""
        alive: list[list[Version]] = [[] for _ in range(self.end + 1)]
        versions = [node for node in self.graph if isinstance(node, Version)]
        for version in sorted(versions, key=lambda version: version.maker):
            last = max(self.graph.successors(version), default=version.maker)
            for position in range(version.maker + 1, last + 1):
                alive[position].append(version)
        return [tuple(versions) for versions in alive]

    @cached_property
    def _reads(self) -> list[tuple[Version, ...]]:
        """For each step, the versions it reads."""
        return [tuple(self.graph.predecessors(step)) for step in range(self.end)]

    def alive(self, position: int) -> tuple[Version, ...]:
        """Versions made before step `position` that it or a later one reads.

        While backward stands there, between `position` and the step before it, exactly these have
        a gradient.
        """
        return self._alive[position]

    @property
    def outputs(self) -> tuple[Version, ...]:
        """The versions wanted at the end."""
        return self._alive[self.end]

    def entry(self, span: range) -> tuple[Version, ...]:
        """Versions that consecutive steps read and did not make themselves."""
        if len(span) == 1:
            return self._reads[span.start]
        read = (version for step in span for version in self._reads[step])
        return tuple(dict.fromkeys(version for version in read if version.maker < span.start))

    def made(self, start: int, position: int) -> tuple[Version, ...]:
        """Versions alive at a position that the steps from `start` on made."""
        return tuple(version for version in self._alive[position] if version.maker >= start)

    @cached_property
    def _made_by(self) -> list[tuple[Version, ...]]:
        return [tuple(self.graph.successors(step)) for step in range(self.end)]

    def made_by(self, step: int) -> tuple[Version, ...]:
        """The versions that a step makes."""
        return self._made_by[step]

    def owns(self, version: Version) -> bool:
        """Whether a version is the chain's own: made by it, or given to it for good."""
        return self.donated or version.maker != INPUT

    def owns_target(self, step: int) -> bool:
        """Whether the version that the step replaces is the chain's own, not the caller's input."""
        return self.owns(self._reads[step][0])

    @cached_property
    def _last_reads(self) -> list[tuple[str, ...]]:
        gone: list[tuple[str, ...]] = []
        for step in range(self.end):
            made, after = self._made_by[step], self._alive[step + 1]
            held = (*(v for v in self._alive[step] if v.tensor not in {m.tensor for m in made}), *made)
            gone.append(tuple(v.tensor for v in held if v not in after))
        return gone

    def last_reads(self, step: int) -> tuple[str, ...]:
        """Tensors whose current version nobody needs once the step has run."""
        return self._last_reads[step]
