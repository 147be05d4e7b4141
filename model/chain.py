"""What can be scheduled: a chain of steps over the state, in groups that a checkpoint may enclose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from model.dropout import dropout_mask
from model.submodule import Submodule


@dataclass(frozen=True, eq=False)
class Step:
    """One submodule at its place in the chain.

    Attributes:
        index: position in the chain; also what its dropout mask is drawn from.
        name: qualified name of the submodule.
        group: number of the block it belongs to.
    """

    index: int
    name: str
    submodule: Submodule
    group: int

    @property
    def target(self) -> str:
        """The state tensor that the step rewrites."""
        return self.submodule.target

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The state tensors that the step reads, its target first."""
        return self.submodule.reads

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The submodule's parameters by name."""
        return dict(self.submodule.named_parameters())

    def tensors(
        self, state: Mapping[str, Tensor], constants: Mapping[str, Tensor], seed: int | None
    ) -> dict[str, Tensor]:
        """Everything the submodule's stages read: state, masks, and the dropout mask of this seed."""
        tensors = {name: state[name] for name in self.reads}
        tensors |= {name: constants[name] for name in self.submodule.constants}
        mask = dropout_mask(self.submodule, state[self.target], seed, self.index)
        return tensors if mask is None else {**tensors, "dropout": mask}


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps in the order in which they run. Groups (blocks) are consecutive."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, stack: nn.Module) -> Chain:
        """The chain of any module with `blocks`, each of which lists its `submodules()`."""
        steps: list[Step] = []
        for group, block in enumerate(stack.blocks):
            for name, submodule in block.submodules():
                steps.append(Step(len(steps), f"blocks.{group}.{name}", submodule, group))
        return cls(tuple(steps))

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The steps of each group."""
        firsts = [s.index for s in self.steps if s.index == 0 or self.steps[s.index - 1].group != s.group]
        return tuple(range(a, b) for a, b in zip(firsts, [*firsts[1:], len(self.steps)], strict=True))

    def reads(self, span: range) -> tuple[str, ...]:
        """The state tensors that consecutive steps read and did not make themselves."""
        return reads_from_outside([self.steps[index].reads for index in span])


def reads_from_outside(step_reads: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Of steps that each rewrite the first tensor they read: what they read before one of them made it."""
    made: set[str] = set()
    names: dict[str, None] = {}
    for reads in step_reads:
        names |= dict.fromkeys(name for name in reads if name not in made)
        made.add(reads[0])
    return tuple(names)
