"""One forward without data: which modules of a model are blocks, what each is given and from where."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import counted_tensors
from evoplan.model.foreign.calls import Argument, Call, Constant, FromState, Made, Passed, Result, Same
from evoplan.model.foreign.finding import blocks_in, closing_in
from evoplan.model.foreign.leaves import Key, Layout, Numbers, Value, twins_in
from evoplan.model.foreign.obstacles import is_simple, obstacles, of_argument
from evoplan.model.foreign.visits import Visit
from evoplan.model.foreign.watching import UNLIKE, Functions, Operator, Watch
from evoplan.model.running.internals import storage_key

LEAST = 0.5  # of the parameters of all blocks that those have which can be planned, where others cannot


class CaptureError(ValueError):
    """A model cannot be planned; the message says why, and what to do."""


@dataclass(frozen=True)
class Captured:
    """A model as a chain of calls.

    Attributes:
        calls: in the order in which they run.
        outputs: names of the state tensors that are read after the last of them.
        notes: what is left as it is, and why: for people.
        left: those of them that tell of blocks.
        unlike_on_meta: whether operators ran that take other memory on the meta device than elsewhere.
        tables: paths of modules in the blocks that have made tensors at their first call which they keep, in
            attributes or as buffers.
        operators: a digest of all that ran, in the blocks and around them.
    """

    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    unlike_on_meta: bool
    operators: str
    tables: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for models whose blocks are called alike and do the same."""
        told = [(c.name, c.work, str(c.arguments), str(c.results), c.makes) for c in self.calls]
        return hashlib.sha256(repr(told).encode()).hexdigest()


def capture(
    model: nn.Module, run: Callable[[], Any], call: Callable[..., Any], others: bool = False
) -> Captured:
    """The chain of a model.

    Args:
        model: without data; its modules' forwards are written over, so a copy that nobody needs.
        run: its forward, on tensors without data.
        call: runs an operator on its arguments there.
        others: whether something in it draws from Python's or NumPy's generators, so that blocks are to be
            looked at for that.

    Raises:
        CaptureError: no blocks are found, or they are given what cannot be checked.
    """
    before = counted_tensors(model)
    with Watch(model, call, others) as watch, Functions() as functions:
        result = run()
    if watch.sparse:
        raise CaptureError(
            "an embedding's gradient is sparse (sparse=True), as large as values tell, of which a plan knows "
            "none; have it sparse=False, or freeze it"
        )
    visits = [visit for visit in blocks_in(watch.root) if visit.recorded]
    if len(visits) < 2:
        raise CaptureError(
            f"{type(model).__name__} has no modules that are called one after the other with autograd on: "
            "a plan is for a stack of blocks, in an nn.ModuleList or an nn.Sequential"
        )
    visits, left = _able(visits, watch.operators)
    visits += takewhile(is_simple, closing_in(watch.root, visits[-1]))
    chain = _wired(visits, watch.operators, pytree.tree_leaves(result))
    unlike = functions.unlike or any(re.match(UNLIKE, operator.about) for operator in watch.operators)
    told = hashlib.sha256("\n".join(operator.about for operator in watch.operators).encode()).hexdigest()
    tables = tuple(
        path
        for path, count in counted_tensors(model).items()
        if count > before.get(path, 0) and any(f"{path}.".startswith(f"{call.path}.") for call in chain.calls)
    )
    notes = (*left, *chain.notes)
    return replace(chain, left=tuple(left), notes=notes, unlike_on_meta=unlike, operators=told, tables=tables)


def _able(visits: list[Visit], operators: list[Operator]) -> tuple[list[Visit], list[str]]:
    """The blocks that can be steps, and what is said of those that are left to the model: all of a class, if
    something stands in the way of one, and there is enough of others.

    Raises:
        CaptureError: there is not; says what stands in the way.
    """
    found = obstacles(visits, operators)
    left = {type(visit.module): f"{visit.path}{said}" for visit, said in reversed(found.items())}
    able = [visit for visit in visits if type(visit.module) not in left]
    if found and (len(able) < 2 or _parameters(able) < LEAST * _parameters(visits)):
        visit, said = next(iter(found.items()))
        raise CaptureError(f"{visit.path}{said}")
    return able, [f"blocks of {kind.__name__} are left as they are: {said}" for kind, said in left.items()]


def _parameters(visits: list[Visit]) -> int:
    modules = {visit.module for visit in visits}
    return sum(p.numel() for module in modules for p in module.parameters())


def captured_again(captured: Captured, visits: list[Visit]) -> Captured:
    """The same chain as other visits of its blocks have it; what the blocks do is known from the first."""
    latest: dict[str, Key] = {}
    calls = []
    for call, visit in zip(captured.calls, visits, strict=True):
        names = {key.numbers: name for name, key in latest.items()}
        read = {at: names[seen] for at, seen in enumerate(visit.numbers) if seen in names}
        arguments = tuple(_argument(visit, at, read, call.name) for at in range(len(visit.arguments)))
        calls.append(replace(call, arguments=arguments, structure=visit.structure))
        made = [at for at, result in enumerate(call.results) if isinstance(result, Made)]
        for name, at in zip(call.makes, made, strict=True):
            key = visit.out_keys[at]
            assert key is not None  # as it is a tensor
            latest[name] = key
    return replace(captured, calls=tuple(calls), notes=(*captured.left, *_notes(calls)))


# --- wiring ------------------------------------------------------------------------------------


def _wired(visits: list[Visit], operators: list[Operator], results: list[Any]) -> Captured:
    versions: dict[Key, tuple[int, int]] = {}  # who has made a tensor: the call, and which of its results
    # The same by numbers: a step is given the tensor that the model has, through which gradients go.
    shown: dict[Numbers | None, tuple[int, int]] = {}
    reads: list[dict[int, tuple[int, int]]] = []  # for each call and argument that is one, which
    last_read: dict[tuple[int, int], int] = {}
    for index, visit in enumerate(visits):
        found = {at: shown[seen] for at, seen in enumerate(visit.numbers) if seen in shown}
        reads.append(found)
        last_read |= dict.fromkeys(found.values(), index)
        for at, key in enumerate(visit.out_keys):
            if key is not None and key not in visit.keys and key not in visit.out_keys[:at]:
                versions[key] = shown[key.numbers] = index, at
    end = len(visits)
    after = operators[visits[-1].stop :]
    storages = {storage_key(leaf) for leaf in results if isinstance(leaf, Tensor)}
    storages = storages.union(*(operator.read for operator in after))
    read_after = [version for key, version in versions.items() if key.numbers[0] in storages]
    last_read |= dict.fromkeys(read_after, end)
    names = _names(visits, versions.values(), last_read)
    calls = tuple(_calls(visits, reads, names, operators))
    return Captured(calls, tuple(names[version] for version in read_after), tuple(_notes(calls)), False, "")


def _names(
    visits: list[Visit], versions: Iterable[tuple[int, int]], last_read: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], str]:
    """Names in the state: the place among the results, so that blocks that are alike are called alike.

    Of another layout it is another tensor; one that is read after its like has been made again has a name of
    its own.
    """
    versions, layouts = sorted(versions), dict[tuple[int, Layout], str]()
    places: Counter[int] = Counter()
    natural = {}
    for index, at in versions:
        layout = Layout.of(visits[index].results[at])
        if (at, layout) not in layouts:
            layouts[at, layout] = f"out{at}" + f".{places[at]}" * (places[at] > 0)
            places[at] += 1
        natural[index, at] = layouts[at, layout]
    names = {}
    for number, version in enumerate(versions):
        name, later = natural[version], versions[number + 1 :]
        following = next((other[0] for other in later if natural[other] == name), None)
        kept = following is not None and last_read.get(version, version[0]) > following
        names[version] = f"{name}@{version[0]}" if kept else name
    return names


def _calls(
    visits: list[Visit],
    reads: list[dict[int, tuple[int, int]]],
    names: Mapping[tuple[int, int], str],
    operators: list[Operator],
) -> Iterator[Call]:
    seen: dict[str, int] = {}
    for index, (visit, read) in enumerate(zip(visits, reads, strict=True)):
        seen[visit.path] = seen.get(visit.path, 0) + 1
        name = visit.path if seen[visit.path] == 1 else f"{visit.path}#{seen[visit.path]}"
        of_state = {at: names[version] for at, version in read.items()}
        arguments = [_argument(visit, at, of_state, name) for at in range(len(visit.arguments))]
        of_call = {at for other, at in names if other == index}
        results = [_result(visit, at, of_call.__contains__) for at in range(len(visit.results))]
        ran = operators[visit.start : visit.stop]
        assert visit.returned is not None
        yield Call(
            index=index,
            path=visit.path,
            name=name,
            structure=visit.structure,
            arguments=tuple(arguments),
            returned=visit.returned,
            results=tuple(results),
            makes=tuple(names[index, at] for at in range(len(results)) if (index, at) in names),
            changes=visit.changes,
            plain=visit.plain,
            draws=visit.others is not None or any(operator.draws for operator in ran),
            others=visit.others,
            work=hashlib.sha256("\n".join(operator.about for operator in ran).encode()).hexdigest(),
        )


def _argument(visit: Visit, at: int, read: Mapping[int, str], name: str) -> Argument:
    leaf = visit.arguments[at]
    if visit.writes:
        raise CaptureError(
            f"{name} writes into what it is given, in place, or changes its lists or dictionaries: run again "
            "it would find something else; have it make new ones"
        )
    if at in read:
        return FromState(read[at], Layout.of(leaf), visit.wanted[at], twins_in(visit.arguments).get(at))
    if isinstance(leaf, Tensor):
        return Constant(Layout.of(leaf), visit.wanted[at], twins_in(visit.arguments).get(at))
    if (said := of_argument(leaf)) is not None:
        raise CaptureError(f"{name}{said}")
    return Value(leaf)


def _result(visit: Visit, at: int, made: Callable[[int], bool]) -> Result:
    leaf = visit.results[at]
    if made(at):
        storages = [None if key is None else key.numbers[0] for key in visit.keys]
        own = storage_key(leaf)
        tensors = (*visit.module.named_parameters(), *visit.module.named_buffers())
        of = {other: key.numbers[0] for other, key in enumerate(visit.out_keys) if key is not None}
        lie_there = [other for other, storage in of.items() if made(other) and storage == own]
        return Made(
            Layout.of(leaf),
            leaf.requires_grad,
            storages.index(own) if own in storages else None,
            next((name for name, tensor in tensors if storage_key(tensor) == own), None),
            leaf.untyped_storage().nbytes(),
            leaf.storage_offset(),
            None if lie_there[0] == at else [*filter(made, range(at))].index(lie_there[0]),
            len(lie_there),
        )
    key = visit.out_keys[at]
    if key is not None and key in visit.keys:
        return Passed(visit.keys.index(key))
    if key is not None:
        first = visit.out_keys.index(key)
        return Same([at for at in range(first + 1) if made(at)].index(first))
    return Value(leaf)


def _notes(calls: Sequence[Call]) -> Iterator[str]:
    """What is kept because only the model itself knows how it is made; whose memory is not known."""
    for call in calls[1:]:
        if not call.reads:
            yield (
                f"{call.name} reads nothing that an earlier block has returned as it is: "
                "what is made between them is kept"
            )
    for call in calls:
        if call.others is not None:
            yield (
                f"{call.name} draws from Python's or NumPy's generator: where it does something else for "
                "that, it may take more memory than predicted; have it draw from torch's"
            )
