"""How one submodule is run: whole, in chunks of an independent axis, or as co-shards of a reduction axis."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"(chunk|coshard)\((\w+), *(\d+)\)")


@dataclass(frozen=True)
class Strategy:
    """`whole`, `chunk(axis, n)` or `coshard(axis, n)`.

    Attributes:
        kind: whole keeps what autograd saves; chunk and coshard keep nothing but the
            submodule's input and recompute each piece on its own in backward.
        axis: name of the axis that is cut; None for whole.
        n: number of pieces.
    """

    kind: str = "whole"
    axis: str | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if (self.kind == "whole") != (self.axis is None) or self.kind not in ("whole", "chunk", "coshard"):
            raise ValueError(f"no such strategy: {self.kind} along {self.axis}")
        if self.kind != "whole" and self.n < 1:
            raise ValueError(f"a {self.kind} needs at least one piece, not {self.n}")

    def __str__(self) -> str:
        return "whole" if self.kind == "whole" else f"{self.kind}({self.axis}, {self.n})"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy that prints as `text`; ValueError says what is expected."""
        if text == "whole":
            return WHOLE
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no strategy; expected whole, chunk(axis, n) or coshard(axis, n)")
        return cls(match[1], match[2], int(match[3]))


WHOLE = Strategy()
