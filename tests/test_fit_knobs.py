"""A model's own knobs: turned where results are equal, put back, and in force when a block runs again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evoplan
from evoplan.model.foreign import equal_results
from evoplan.model.running.strategy import Strategy
from evoplan.planner.fitting.fitted import Fitted
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, all_runs
from tests.test_cli import call
from tests.test_fit import assert_same, step
from tests.zoo import Case, random

VALUES = [None, 4, 9]


class Mixer(nn.Module):
    """Pairs of all positions, whose queries may go by in chunks; how, is an argument and an attribute.

    Attributes:
        wrong: chunks leave the last query out.
        sizes: of the chunks that were made, in turn.
    """

    def __init__(self, width: int = 8, wrong: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.up = (nn.Linear(width, width) for _ in range(3))
        self.wrong, self.sizes, self.chunk, self._own = wrong, [], None, None
        self.options: dict[str, int] = {}

    def forward(self, x: Tensor, chunk_size: int | None = None) -> Tensor:
        size = chunk_size or self.chunk or self._own
        self.sizes.append(size)
        key, query = self.key(x), self.query(x)
        made = [self.some(part, key) for part in (query.split(size, 1) if size else [query])]
        if self.wrong and len(made) > 1:
            made[-1] = made[-1] * 1.001
        return x + self.up(torch.cat(made, 1))

    def some(self, query: Tensor, key: Tensor) -> Tensor:
        return F.gelu(query[:, :, None] * key[:, None]).mean(2)


class Around(nn.Module):
    """A block that calls it by position, whose argument has a default of its own."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.norm, self.mixer, self.dropout = nn.LayerNorm(8), Mixer(wrong=wrong), nn.Dropout(0.2)

    def forward(self, x: Tensor, chunk_size: int | None = None) -> Tensor:
        return x + self.dropout(self.mixer(self.norm(x), chunk_size))

    def set_chunk(self, chunk: int | None) -> None:
        if chunk == 3:
            raise RuntimeError("no chunks of three")
        self.mixer._own = chunk


class Stack(nn.Module):
    def __init__(self, by_position: bool = False, wrong: bool = False) -> None:
        super().__init__()
        self.blocks, self.by_position = nn.ModuleList(Around(wrong) for _ in range(3)), by_position

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None) if self.by_position else block(x)
        return x


def made(**options: bool) -> Case:
    torch.manual_seed(0)
    return Case(Stack(**options).double(), (random(2, 21, 8).requires_grad_(),))


def set_chunk(block: nn.Module, value: int | None) -> None:
    block.set_chunk(value)


KNOBS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "argument": ({"chunk_size": VALUES}, {}),
    "by position": ({"chunk_size": VALUES}, {"by_position": True}),
    "attribute": ({"chunk": VALUES}, {}),
    "setter": ({"its_own": (set_chunk, VALUES[1:])}, {}),
}


def sizes_of(model: nn.Module, run: Callable[[], Any]) -> list[list[int | None]]:
    """Of the chunks that blocks have made while something ran."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    for mixer in mixers:
        mixer.sizes.clear()
    run()
    return [list(mixer.sizes) for mixer in mixers]


@pytest.mark.parametrize("kind", KNOBS)
def test_every_value_is_combined_with_every_way_to_recompute(kind: str) -> None:
    """Gradients are those of the model; the measured peak is the predicted one; the model is as it was."""
    knobs, options = KNOBS[kind]
    given, (name,) = made(**options), knobs
    expected = step(given, copy.deepcopy(given.model))
    under = given.fit(knobs=knobs)
    fitting, plan = under._fitting, under.plan
    under.remove()
    strategies = [cost.strategy for cost in fitting.table.options[1]]
    assert {f"whole[.{name}=set(4)]", f"lean[.{name}=set(4)]"} & set(map(str, strategies))
    assert any(strategy.knobs and strategy.modules for strategy in strategies)
    for strategy in (one for one in strategies if one.knobs):
        schedule = Sequence(tuple(Run(at, strategy) for at in range(3)))
        about = {"schedule": schedule, "predicted": fitting.predict(schedule)}
        fitted = Fitted(fitting, plan.model_copy(update=about), "error")
        assert_same(expected, step(given))
        found = fitted.verify(given.args, given.kwargs)
        fitted.remove()
        assert found.ok, (strategy, found)
        assert 0.97 <= found.measured_peak_bytes / found.predicted_peak_bytes <= 1, strategy
    assert all(block.mixer.chunk is block.mixer._own is None for block in given.model.blocks)


@pytest.mark.parametrize("kind", KNOBS)
def test_the_value_is_in_force_when_a_block_runs_again_and_nowhere_else(kind: str) -> None:
    """In a redo that a checkpoint asks for, and in one of a module; the third block is under no knob."""
    knobs, options = KNOBS[kind]
    given, (name,) = made(**options), knobs
    under = given.fit(knobs=knobs)
    under.remove()
    turned, redo = (Strategy.parse(f"whole[{way}.{name}=set(4)]") for way in ("", "mixer=redo, "))
    body = Sequence((Run(0, turned),))
    parts = Checkpoint(body, (turned,)), Run(1, redo), Run(2, Strategy.parse("whole"))
    patched = Patched(given.model, under._fitting.captured, Sequence(parts))
    patched.install()
    assert sizes_of(given.model, lambda: step(given)) == [[4, 4], [4, 4], [None]]
    with torch.no_grad():
        assert sizes_of(given.model, lambda: given.model(*given.args)) == [[None], [None], [None]]


def test_less_memory_than_without_knobs() -> None:
    """Chunks of the block's own that are cheaper than anything else: where no slices are to be had."""
    given = made()
    without = given.fit(budget=None)
    without.remove()
    fitted = given.fit(knobs=KNOBS["argument"][0])
    assert fitted.plan.least_feasible_bytes <= without.plan.least_feasible_bytes
    fitted.replan(fitted.plan.least_feasible_bytes)
    found = fitted.verify(given.args, given.kwargs)
    assert found.ok, found
    assert found.measured_peak_bytes <= fitted.plan.budget_bytes


def test_values_that_change_results_are_left_out_and_named() -> None:
    given = made(wrong=True)
    fitted = given.fit(knobs={"chunk_size": VALUES})
    assert not any(cost.strategy.knobs for options in fitted._fitting.table.options for cost in options)
    assert [note[:60] for note in fitted.plan.notes] == [
        "in blocks.0 and 2 more, chunk_size=4 is not used: it changes"[:60],
        "in blocks.0 and 2 more, chunk_size=9 is not used: it changes"[:60],
    ]


def test_small_sizes_are_larger_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial with seven positions would say nothing of chunks of forty, and one in full is too large."""
    monkeypatch.setattr(equal_results, "MOST_NUMBERS", 2000)
    torch.manual_seed(0)
    given = Case(Stack(wrong=True).double(), (random(2, 150, 8),))
    fitted = given.fit(knobs={"chunk_size": [40, 140]})
    assert ["it changes results" in note for note in fitted.plan.notes] == [True, False]
    assert "chunk_size=140 is not used: it is too large to be tried" in fitted.plan.notes[1]


def test_a_setter_that_fails_leaves_its_value_out_and_the_block_as_it_was() -> None:
    given = made()
    fitted = given.fit(knobs={"its_own": (set_chunk, [3, 4])})
    (note,) = fitted.plan.notes
    assert "its_own=3 is not used: it does not run so" in note
    assert "no chunks of three" in note


def test_a_setter_that_leaves_something_behind_is_not_used() -> None:
    """Attributes are put back; what is within them, and modules in the place of others, are not."""

    def writes(block: Any, value: int) -> None:
        block.mixer.options["chunk"] = value

    def replaces(block: Any, value: int) -> None:
        block.dropout = nn.Dropout(0.2)

    for setter in (writes, replaces):
        fitted = made().fit(knobs={"its_own": (setter, [4])})
        assert "its_own=4 is not used: its setter changes more than attributes" in fitted.plan.notes[0]


def test_a_knob_is_put_back_after_an_exception() -> None:
    given = made()
    under = given.fit(knobs=KNOBS["attribute"][0])
    under.remove()
    runs = tuple(Run(at, Strategy.parse("whole[.chunk=set(4)]")) for at in range(3))
    Patched(given.model, under._fitting.captured, Sequence(runs)).install()
    block = given.model.blocks[1]

    def fails(*args: Any) -> None:
        assert block.mixer.chunk == 4
        raise KeyError("within")

    block.mixer.up.register_forward_hook(fails)
    with pytest.raises(KeyError, match="within"):
        given.model(*given.args)
    assert block.mixer.chunk is None


def test_plans_are_read_again_and_refused_without_their_knobs(tmp_path: Path) -> None:
    given, path = made(), tmp_path / "plan.json"
    under = given.fit(knobs=KNOBS["argument"][0])
    under.remove()
    fitting = under._fitting
    schedule = Sequence(tuple(Run(at, Strategy.parse("whole[.chunk_size=set(4)]")) for at in range(3)))
    about = {"schedule": schedule, "predicted": fitting.predict(schedule)}
    under.plan.model_copy(update=about).save(path)
    again = given.fit(plan=path, knobs=KNOBS["argument"][0])
    assert {str(run.strategy) for run in all_runs(again.plan.schedule)} == {"whole[.chunk_size=set(4)]"}
    again.remove()
    for knobs in (None, {"chunk_size": [5]}):
        with pytest.raises(
            evoplan.CaptureError, match=r"cannot be run .*give `knobs` that have chunk_size=4"
        ):
            given.fit(plan=path, knobs=knobs)
    with pytest.raises(ValueError, match="no way to run a module"):
        Strategy.parse("whole[.chunk_size=redo]")
    with pytest.raises(ValueError, match="no way to run a module"):
        Strategy.parse("whole[mixer=set(4)]")
    for values in ("4", "7"):  # of a strategy that was put together by hand
        strategy = Strategy.parse(f"whole[.{'other' if values == '4' else 'chunk_size'}=set({values})]")
        runs = Sequence(tuple(Run(at, strategy) for at in range(3)))
        model = copy.deepcopy(given.model)
        Patched(model, fitting.captured, runs).install()
        with pytest.raises(ValueError, match=r"has no knob other|has no value 7"):
            model(*given.args)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"chunk size": [4]}, "the name of an argument or an attribute"),
        ({"chunk_size": []}, "give a list of None"),
        ({"chunk_size": "4"}, "give a list of None"),
        ({"chunk_size": [torch.ones(1)]}, "give a list of None"),
        ({"chunk_sizes": [4]}, "no block takes an argument chunk_sizes"),
        ({"chunk_size": list(range(1, 30))}, "29 combinations; give at most 16"),
    ],
)
def test_what_is_no_knob_is_told(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made().fit(knobs=knobs)


def test_inspect_proposes_knobs() -> None:
    given = made()
    seen = evoplan.inspect(given.model, given.args)
    assert seen.knobs == {"chunk_size": [4, 16]}  # of 21 positions
    assert "knob chunk_size=16: equal results" in seen.report()
    assert "evoplan.fit(..., knobs={'chunk_size': [4, 16]})" in seen.report()
    wrong = evoplan.inspect(made(wrong=True).model, given.args)
    assert wrong.knobs == {}
    assert "knob chunk_size=4: it changes results" in wrong.report()


BUILDS = """
import torch
from torch import nn
from tests.test_fit_knobs import Stack


def build():
    return Stack(), (torch.randn(2, 21, 8),), {}, None, {"chunk_size": [None, 4]}
"""


def test_a_file_that_builds_a_model_may_name_its_knobs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BUILDS)
    source, plan = f"{tmp_path / 'mine.py'}:build", tmp_path / "plan.json"
    code, printed, error = call(capsys, "plan", "--from", source, "--memory", "100KiB", "--out", str(plan))
    assert code == 0, error
    assert ".chunk_size=set(4)" in plan.read_text()
    code, printed, error = call(capsys, "inspect", source)
    assert code == 0, error
    assert "knob chunk_size=4: equal results" in printed


@pytest.mark.slow  # half a minute
def test_chunks_of_openfold_3() -> None:
    """Its Pairformer's own chunks of triangle attention."""
    pytest.importorskip("openfold3")
    from tests.test_fit_originals import EXAMPLES, built

    (path,) = (path for path in EXAMPLES if path.stem == "openfold3_pairformer")
    given = built(path, torch.float64)
    expected = step(given, copy.deepcopy(given.model))
    fitted = given.fit(knobs={"chunk_size": [None, 4]})
    assert not fitted.plan.notes
    turned = Strategy.parse("whole[.chunk_size=set(4)]")
    assert turned in {cost.strategy for cost in fitted._fitting.table.options[0]}
    fitted.remove()
    runs = Sequence(tuple(Run(at, turned) for at in range(4)))
    about = {"schedule": runs, "predicted": fitted._fitting.predict(runs)}
    fitted = Fitted(fitted._fitting, fitted.plan.model_copy(update=about), "error")
    assert_same(expected, step(given), 1e-10)
    found = fitted.verify(given.args, given.kwargs)
    assert found.ok, found
    assert 0.98 <= found.measured_peak_bytes / found.predicted_peak_bytes <= 1
