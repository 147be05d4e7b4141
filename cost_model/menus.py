"""Which modules of a block are worth being run otherwise, and together with which others.

Every subset of a block's modules is a way to run it. A few of them are enough: first those that free most for
the time that they take to run again, each with all before it; then, with all of them, ever less memory at the
peak of a backward, where the largest are cut into slices, or recomputed module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evoplan.model.foreign.children import SELF, Axis, Child
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import PIECES, Strategy, Within

REDO = "redo"
WORTH = 0.02  # of what a block keeps: less is not worth a thought
SETS = 5  # of modules recomputed, from few to all
LEVELS = (2, 4, 8, 16)  # parts of the largest module's peak that are tried for
CUTS = (2, 4, 8, 16)  # slices of a whole block

Ways = dict[str, str]  # by path


def strategies_of(children: Mapping[str, Child], turned: Sequence[Mapping[str, str]] = ()) -> list[Strategy]:
    """What a block can run under, without what comes to the same.

    Args:
        children: what it calls, by path in it, itself among them.
        turned: values of its own knobs under which it may run as well, by name.
    """
    # Slices were shown with its knobs as they are: turned, nothing is cut. Each value is traced in all these
    # ways; so of those that recompute modules, the rest being lean as well is left out.
    settings: list[Ways] = [{f".{name}": f"set({value})" for name, value in one.items()} for one in turned]
    uncut = [
        Strategy(strategy.kind, within=_within(dict(strategy.within) | setting))
        for setting in settings
        for strategy in _untouched(children)
        if set(dict(strategy.within).values()) <= {REDO}
        and not (strategy.within and strategy.kind == LEAN.kind)
    ]
    return list(dict.fromkeys([*_untouched(children), *uncut]))


def _untouched(children: Mapping[str, Child]) -> list[Strategy]:
    """Those under which its knobs are as the model has them."""
    offered = [WHOLE, LEAN]
    # Modules that change their buffers are not run again one by one.
    if not children[SELF].changes:
        sets = list(_sets(children))
        for ways in sets:
            offered += [Strategy(kind.kind, within=_within(ways)) for kind in (WHOLE, LEAN)]
        for ways in _lower(children, sets[-1] if sets else {}):
            offered.append(Strategy(WHOLE.kind, within=_within(ways)))
    return offered


def _within(ways: Ways) -> Within:
    return tuple(sorted(ways.items()))


def _may(child: Child) -> bool:
    return child.path != SELF and child.stays and not set(child.path) & set("=,[]")


def _sets(children: Mapping[str, Child]) -> Iterator[Ways]:
    """Ever more modules that are recomputed, at most so many sets: each frees about as much as another."""
    least = max(1, WORTH * children[SELF].kept_bytes)
    chosen: list[Child] = []
    found: list[tuple[int, Ways]] = []
    while move := _best_move(children, chosen, least):
        chosen = [other for other in chosen if not _lies_in(other, move)] + [move]
        found.append(
            (sum(child.kept_bytes for child in chosen), dict.fromkeys((c.path for c in chosen), REDO))
        )
    step = found[-1][0] / SETS if found else 0
    last = 0.0
    for saved, ways in found:
        if saved >= last + step or saved == found[-1][0]:
            last = saved
            yield ways


def _best_move(children: Mapping[str, Child], chosen: list[Child], least: float) -> Child | None:
    """The module that frees most for its time, beside those that are chosen.

    One that is little but several others comes when they have.
    """
    best, best_rate = None, 0.0
    able = [child for child in filter(_may, children.values()) if child.kept_bytes >= least]
    for child in able:
        if any(child is other or _lies_in(child, other) for other in chosen):
            continue
        inner = [other for other in able if other.parent == child.path]
        if len(inner) > 1 and not all(other in chosen for other in inner):
            continue
        within = [other for other in chosen if _lies_in(other, child)]
        gain = child.kept_bytes - sum(other.kept_bytes for other in within)
        cost = child.seconds - sum(other.seconds for other in within)
        rate = gain / max(cost, 1e-9)
        if gain >= least and rate > best_rate:
            best, best_rate = child, rate
    return best


def _lies_in(one: Child, other: Child) -> bool:
    return one.path.startswith(other.path + ".")


def _lower(children: Mapping[str, Child], ways: Ways) -> Iterator[Ways]:
    """The same with ever less at the peak; and the whole block in slices."""
    largest = max((children[path].peak_bytes for path in ways), default=0)
    for part in LEVELS:
        lower: Ways = {}
        for path in ways:
            lower |= _lowered(children, children[path], largest / part)
        yield lower
    if axis := _longest(children[SELF]):
        yield from ({SELF: f"chunk({axis.dim}, {n})"} for n in CUTS if n <= axis.length)


def _lowered(children: Mapping[str, Child], child: Child, most: float) -> Ways:
    """How a module is run so that backward takes about so much for it, if that can be."""
    if child.peak_bytes <= most:
        return {child.path: REDO}
    if axis := _longest(child):
        able = [n for n in PIECES if n <= axis.length]
        enough = [n for n in able if child.peak_bytes / n <= most]
        return {child.path: f"chunk({axis.dim}, {(enough or able[-1:])[0]})"}
    ways = {child.path: REDO}
    for inner in children.values():
        if inner.parent == child.path and inner.peak_bytes > most and _may(inner):
            ways |= _lowered(children, inner, most)
    return ways


def _longest(child: Child) -> Axis | None:
    return max(child.axes, key=lambda axis: axis.length, default=None)
