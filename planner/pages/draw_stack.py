"""The stack of blocks as a picture: blocks are columns, submodules rows, checkpoints frames."""

from __future__ import annotations

from html import escape

from evoplan.planner.pages.stack import Bracket, Cell, Decisions
from evoplan.planner.pages.svg import GLYPH, el, label, shortened

WIDTH, NAMES, ROW, LANE = 1000, 208, 24, 8
PER_BAND = 48  # columns; more blocks go below
MOST_LANES = 16
MOST_TICKS = 4


def draw_stack(found: Decisions) -> str:
    """An SVG for each stack and for each few blocks of a long one; every step is one cell in one of them."""
    drawn = []
    for stack in found.stacks:
        cells = [cell for cell in found.cells if cell.stack == stack]
        rows = _rows(cells)
        columns = sorted({cell.column for cell in cells})
        for few in _batches(columns, PER_BAND):
            inside = [cell for cell in cells if few[0] <= cell.column <= few[-1]]
            width = min(34.0, (WIDTH - NAMES - 12) / min(len(columns), PER_BAND))
            drawn.append(_Band(stack, rows, few, inside, found.brackets, width).draw())
    return "".join(drawn)


def _rows(cells: list[Cell]) -> list[str]:
    """Rows in the order of a block's steps: of the block that has the most, since the first may lack some."""
    blocks: dict[int, list[str]] = {}
    for cell in cells:
        blocks.setdefault(cell.column, []).append(cell.row)
    fullest = max(blocks.values(), key=len)
    return list(dict.fromkeys((*fullest, *(cell.row for cell in cells))))


def _batches(columns: list[int], size: int) -> list[list[int]]:
    return [columns[at : at + size] for at in range(0, len(columns), size)]


class _Band:
    """Some columns of one stack."""

    def __init__(
        self,
        stack: str,
        rows: list[str],
        columns: list[int],
        cells: list[Cell],
        brackets: tuple[Bracket, ...],
        width: float,
    ) -> None:
        self.stack, self.rows, self.columns, self.cells, self.width = stack, rows, columns, cells, width
        self.at = {column: at for at, column in enumerate(columns)}
        self.row_at = {row: at for at, row in enumerate(rows)}
        self.own = {cell.step: cell for cell in cells}
        spans = [(one, self._inside(one)) for one in brackets]
        self.wide = [(o, c) for o, c in spans if c and (len({x.column for x in c}) > 1 or not _whole(o, c))]
        self.narrow = [(o, c) for o, c in spans if c and len({x.column for x in c}) == 1 and _whole(o, c)]
        lanes = max((one.level + 1 for one, _ in self.wide), default=0)
        self.top = 6 + LANE * min(lanes, MOST_LANES)

    def _inside(self, bracket: Bracket) -> list[Cell]:
        return [self.own[s] for s in range(bracket.first, bracket.last + 1) if s in self.own]

    def x(self, cell: Cell) -> float:
        return NAMES + self.width * self.at[cell.column]

    def y(self, cell: Cell) -> float:
        return self.top + ROW * self.row_at[cell.row]

    def draw(self) -> str:
        bottom = self.top + ROW * len(self.rows)
        parts = [
            label(NAMES - 8, self.top + ROW * at + 16, shortened(row, NAMES - 12, 11), "end",
                  class_="tick")
            for at, row in enumerate(self.rows)
        ]  # fmt: skip
        parts += [self._cell(cell) for cell in self.cells]
        parts += [self._outline(one, cells) for one, cells in self.narrow]
        parts += [self._bracket(one, cells) for one, cells in self.wide]
        parts.append(self._numbers(bottom))
        name = f"{self.stack or 'steps'} {self.columns[0]} to {self.columns[-1]}"
        heading = f'<p class="small">{escape(name)}</p>'
        return heading + el(
            "svg", *parts, viewBox=f"0 0 {WIDTH} {bottom + 20}", role="img", aria_label=name, class_="stack"
        )

    def _cell(self, cell: Cell) -> str:
        x, y, width = self.x(cell), self.y(cell), self.width
        again = cell.runs > 1
        parts = [
            el("title", escape(cell.words)),
            el("rect", x=x + 1, y=y + 1, width=width - 2, height=ROW - 2, rx=2),
        ]
        if cell.n > 1 and width >= 2 * GLYPH * 9:
            size = 9 if width < 22 else 11
            parts.append(label(x + width / 2, y + 15, str(cell.n), "middle", font_size=size))
        if again:
            ticks = min(cell.runs - 1, MOST_TICKS)
            step = (width - 4) / MOST_TICKS
            parts += [
                el("rect", x=x + 2 + step * at, y=y + ROW - 4, width=max(1, step - 1), height=2, class_="run")
                for at in range(ticks)
            ]
        if cell.kernel:
            parts.append(el("circle", cx=x + width - 4, cy=y + 4.5, r=1.8, class_="mark"))
        if cell.away:
            parts.append(el("path", d=f"M{x + 1:g} {y + 1:g}h6l-6 6z", class_="mark"))
        kinds = f"cell k-{cell.kind}" + (" again" if again else "")
        return el("g", *parts, class_=kinds, data_step=cell.step)

    def _outline(self, one: Bracket, cells: list[Cell]) -> str:
        """Around the steps of one block; inner ones further in."""
        inset = 0.5 + 1.5 * min(one.level, 3)
        ends = [self.y(cell) for cell in cells]
        return el(
            "rect", el("title", escape(one.words)), x=self.x(cells[0]) + inset, y=min(ends) + inset,
            width=self.width - 2 * inset, height=max(ends) - min(ends) + ROW - 2 * inset, rx=3,
            class_="checkpoint alone" if len(cells) == 1 else "checkpoint",
        )  # fmt: skip

    def _bracket(self, one: Bracket, cells: list[Cell]) -> str:
        """Over whole blocks; open where it goes on in another band."""
        left, right = self.x(cells[0]) + 2, self.x(cells[-1]) + self.width - 2
        y = 4 + LANE * min(one.level, MOST_LANES - 1)
        from_here, to_here = one.first in self.own, one.last in self.own
        start = f"M{left:g} {y + 5}V{y}" if from_here else f"M{left - 4:g} {y}"
        end = f"V{y + 5}" if to_here else "h4"
        path = el("path", d=f"{start}H{right:g}{end}", class_="checkpoint")
        return el("g", el("title", escape(one.words)), path, class_="bracket")

    def _numbers(self, bottom: float) -> str:
        every = next(n for n in (1, 2, 4, 8, 16) if n * self.width >= 26 or n == 16)
        return "".join(
            label(NAMES + self.width * (at + 0.5), bottom + 14, str(column), "middle", class_="tick")
            for at, column in enumerate(self.columns)
            if at % every == 0
        )


def _whole(one: Bracket, cells: list[Cell]) -> bool:
    """Whether all of a checkpoint's steps are among these."""
    return len(cells) == one.last - one.first + 1
