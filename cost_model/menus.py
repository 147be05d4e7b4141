"""Which modules of a block are worth being run otherwise, and together with which others.

Every subset of a block's modules is a way to run it. A few of them are enough: first those that free most for
the time that they take to run again, each with all before it; then, with all of them, ever less memory at the
peak of a backward, where the largest are cut into slices, or recomputed module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evoplan.model.foreign.children import SELF, Axis, Child, Declared
from evoplan.model.foreign.inside import ALL_AGAIN
from evoplan.model.foreign.leaves import Layout
from evoplan.model.running.kernels import kernels_for
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import PIECES, REDO, Strategy, Within

WORTH = 0.02  # of what a block keeps: less is not worth a thought
SETS = 5  # of modules recomputed, from few to all
LEVELS = (2, 4, 8, 16)  # parts of the largest module's peak that are tried for
CUTS = (2, 4, 8, 16)  # slices of a whole block
WITH_KERNEL = 5  # times what it makes is what attention keeps

Ways = dict[str, str]  # by path


def strategies_of(
    children: Mapping[str, Child], turned: Sequence[Mapping[str, str]] = (), kind: str = "cpu"
) -> list[Strategy]:
    """What a block can run under, without what comes to the same.

    Args:
        children: what it calls, by path in it, itself among them.
        turned: values of its own knobs under which it may run as well, by name.
        kind: of device: kernels are made for one.
    """
    kernel = kernels_for(kind)[0]
    # Modules that change their buffers are not run again one by one.
    sets = [] if children[SELF].changes else list(_sets(children))
    offered = [WHOLE, LEAN]
    for how, ways in _kept_so(children, kernel):
        again = [_again(children, paths, kernel) for paths in sets]
        offered += [Strategy(how.kind, within=_within(ways | redone)) for redone in ({}, *again)]
    if not children[SELF].changes:
        offered.append(Strategy(WHOLE.kind, within=ALL_AGAIN))
        lower = _lower(children, sets[-1] if sets else [], kernel)
        offered += [Strategy(WHOLE.kind, within=_within(ways)) for ways in lower]
    # Slices were shown with its knobs as they are: turned, nothing is cut. Each value is traced in all these
    # ways; so of those that recompute modules, the rest being lean as well is left out.
    redone = [_within(dict.fromkeys(paths, REDO)) for paths in sets]
    turned_so = [WHOLE, LEAN, *(Strategy(WHOLE.kind, within=within) for within in redone)]
    for values in turned:
        setting = {f".{name}": f"set({value})" for name, value in values.items()}
        offered += [
            Strategy(strategy.kind, within=_within(dict(strategy.within) | setting)) for strategy in turned_so
        ]
    return list(dict.fromkeys(offered))


def _kept_so(children: Mapping[str, Child], kernel: str) -> list[tuple[Strategy, Ways]]:
    """How a block runs whose modules are kept: submodules of ours are lean at less cost than operators."""
    able = [] if children[SELF].changes else [child for child in children.values() if child.declared]
    if not able:
        return [(WHOLE, {}), (LEAN, {})]
    attending = {child.path: f"{LEAN.kind}+{kernel}" for child in able if _attends(child)}
    others = [child.path for child in able if not _attends(child)]
    whole, lean = (dict.fromkeys(others, kind.kind) for kind in (WHOLE, LEAN))
    return [(WHOLE, whole), (WHOLE, whole | attending), (WHOLE, lean | attending)]


def _again(children: Mapping[str, Child], paths: Sequence[str], kernel: str) -> Ways:
    """Modules that are recomputed, a submodule of ours in two pieces: that takes less, and hardly longer."""
    found = {}
    for path in paths:
        declared = children[path].declared
        found[path] = REDO if declared is None else _declared_chunk(declared, 2, kernel)
    return found


def _declared_chunk(declared: Declared, n: int, kernel: str) -> str:
    axis = max(declared.axes, key=lambda name: declared.axes[name])
    return f"chunk({axis}, {n})" + (f"+{kernel}" if declared.attends else "")


def _attends(child: Child) -> bool:
    return child.declared is not None and child.declared.attends


def _kept_bytes(children: Mapping[str, Child], child: Child) -> int:
    """What it keeps as it runs if it is kept: what attends in it has a kernel then."""
    attending = [other for other in children.values() if _attends(other)]
    within = [other for other in attending if other is child or _lies_in(other, child)]
    return child.kept_bytes - sum(max(0, other.kept_bytes - _with_kernel(other)) for other in within)


def _with_kernel(child: Child) -> int:
    """What attention keeps with a kernel: about q, k, v, what they make and a gate."""
    return WITH_KERNEL * sum(then.nbytes for then in child.results if isinstance(then, Layout))


def _within(ways: Ways) -> Within:
    return tuple(sorted(ways.items()))


def _may(child: Child) -> bool:
    return child.path != SELF and child.stays and not set(child.path) & set("=,[]")


def _sets(children: Mapping[str, Child]) -> Iterator[list[str]]:
    """Ever more modules that are recomputed, at most so many sets: each frees about as much as another."""
    chosen: list[Child] = []
    found: list[tuple[int, list[str]]] = []
    while move := _best_move(children, chosen):
        chosen = [other for other in chosen if not _lies_in(other, move)] + [move]
        found.append(
            (sum(_kept_bytes(children, child) for child in chosen), [child.path for child in chosen])
        )
    step = found[-1][0] / SETS if found else 0
    last = 0.0
    for saved, paths in found:
        if saved >= last + step or saved == found[-1][0]:
            last = saved
            yield paths


def _best_move(children: Mapping[str, Child], chosen: list[Child]) -> Child | None:
    """The module that frees most for its time, beside those that are chosen.

    One that is little but several others comes when they have.
    """
    best, best_rate = None, 0.0
    able, least = _able(children), _least(children)
    for child in able:
        if any(child is other or _lies_in(child, other) for other in chosen):
            continue
        inner = [other for other in able if other.parent == child.path]
        if len(inner) > 1 and not all(other in chosen for other in inner):
            continue
        within = [other for other in chosen if _lies_in(other, child)]
        gain = _kept_bytes(children, child) - sum(_kept_bytes(children, other) for other in within)
        cost = child.seconds - sum(other.seconds for other in within)
        rate = gain / max(cost, 1e-9)
        if gain >= least and rate > best_rate:
            best, best_rate = child, rate
    return best


def _able(children: Mapping[str, Child]) -> list[Child]:
    """Modules that may run again, and keep enough that it is worth a thought."""
    least = _least(children)
    return [
        child
        for child in filter(_may, children.values())
        if _kept_bytes(children, child) >= least and not _within_declared(children, child)
    ]


def _least(children: Mapping[str, Child]) -> float:
    return max(1, WORTH * children[SELF].kept_bytes)


def _within_declared(children: Mapping[str, Child], child: Child) -> bool:
    return any(other.declared is not None and _lies_in(child, other) for other in children.values())


def _lies_in(one: Child, other: Child) -> bool:
    return one.path.startswith(other.path + ".")


def _lower(children: Mapping[str, Child], paths: Sequence[str], kernel: str) -> Iterator[Ways]:
    """The same with ever less at the peak; and the whole block in slices."""
    largest = max((children[path].peak_bytes for path in paths), default=0)
    for part in LEVELS:
        lower: Ways = {}
        for path in paths:
            lower |= _lowered(children, children[path], largest / part, kernel)
        yield lower
    if axis := _longest(children[SELF]):
        yield from ({SELF: f"chunk({axis.dim}, {n})"} for n in CUTS if n <= axis.length)


def _lowered(children: Mapping[str, Child], child: Child, most: float, kernel: str) -> Ways:
    """How a module is run so that backward takes about so much for it, if that can be."""
    if child.peak_bytes <= most:
        return {child.path: REDO}
    if axis := _longest(child):
        return {child.path: f"chunk({axis.dim}, {_pieces(child, axis.length, most)})"}
    if (declared := child.declared) is not None:
        n = _pieces(child, max(declared.axes.values()), most)
        return {child.path: _declared_chunk(declared, n, kernel)}
    # What is little but several others is not run again around them: each would run three times.
    within = [inner for inner in _able(children) if inner.parent == child.path]
    ways = {child.path: REDO} if len(within) < 2 else {}
    for inner in within:
        if len(within) > 1 or inner.peak_bytes > most:
            ways |= _lowered(children, inner, most, kernel)
    return ways


def _pieces(child: Child, length: int, most: float) -> int:
    able = [n for n in PIECES if n <= length]
    enough = [n for n in able if child.peak_bytes / n <= most]
    return (enough or able[-1:])[0]


def _longest(child: Child) -> Axis | None:
    return max(child.axes, key=lambda axis: axis.length, default=None)
