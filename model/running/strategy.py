"""How one submodule is run: whole, in chunks of an independent axis, or as co-shards of a reduction axis."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"(?:(whole|lean)|(chunk|coshard)\((\w+), *(\d+)\))(?:\+([\w-]+(?:\(\w+\))?))?")

EAGER = "eager"  # attention as the formula is written
COMPILED = "compiled"  # the same, the whole submodule through torch.compile


@dataclass(frozen=True)
class Strategy:
    """`whole`, `lean`, `chunk(axis, n)` or `coshard(axis, n)`, and the kernel that attention runs with.

    Attributes:
        kind: whole keeps what autograd saves; lean keeps of that what is expensive to make again
            (`model.running.remake`); chunk and coshard keep nothing but the submodule's input and recompute
            each piece on its own in backward.
        axis: name of the axis that is cut; None for whole and lean.
        n: number of pieces.
        kernel: of `model.running.kernels`; printed after a plus unless it is eager.
    """

    kind: str = "whole"
    axis: str | None = None
    n: int = 1
    kernel: str = EAGER

    def __post_init__(self) -> None:
        kinds = ("whole", "lean") if self.axis is None else ("chunk", "coshard")
        if self.kind not in kinds:
            raise ValueError(f"no such strategy: {self.kind} along {self.axis}")
        if self.in_pieces and self.n < 1:
            raise ValueError(f"a {self.kind} needs at least one piece, not {self.n}")

    @property
    def in_pieces(self) -> bool:
        """Whether it keeps nothing but the submodule's input."""
        return self.axis is not None

    def __str__(self) -> str:
        how = f"{self.kind}({self.axis}, {self.n})" if self.in_pieces else self.kind
        return how if self.kernel == EAGER else f"{how}+{self.kernel}"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy that prints as `text`; ValueError says what is expected."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no strategy; expected whole, lean, chunk(axis, n) or coshard(axis, n), "
                "and +kernel where it is not eager"
            )
        kernel = match[5] or EAGER
        return cls(match[1], kernel=kernel) if match[1] else cls(match[2], match[3], int(match[4]), kernel)


WHOLE, LEAN = Strategy(), Strategy("lean")
