"""Pages, snapshots and traces: what they say is what the plan and its replay say, to the byte."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.cuda import _memory_viz

import evoplan
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.commands.cli import main
from evoplan.planner.pages.account import Account, account_of
from evoplan.planner.pages.content import Frontier, content_of_plan
from evoplan.planner.pages.draw_frontier import draw_frontier
from evoplan.planner.pages.draw_memory import draw_memory
from evoplan.planner.pages.draw_stack import draw_stack
from evoplan.planner.pages.page import page
from evoplan.planner.pages.stack import decisions
from evoplan.planner.pages.svg import GLYPH, Box
from evoplan.planner.plans.plan import Plan, load_plan
from evoplan.planner.plans.recosting import cost_of_plan
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from evoplan.planner.sizes import exact_size
from tests.conftest import TINY, examples
from tests.test_cli import SMALL, call
from tests.zoo import case


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    main(["plan", *SMALL, "--n-blocks", "3", "--memory", "4.7MB", "--certify", "--out", str(path)])
    return str(path)


@pytest.fixture(scope="module")
def plan(plan_file: str) -> Plan:
    return load_plan(plan_file)


@pytest.fixture(scope="module")
def account(plan: Plan) -> Account:
    costed, _ = cost_of_plan(plan)
    names = [f"blocks.{step // 9}.step_{step % 9}" for step in plan.schedule.span]
    return account_of("a model", names, plan.schedule, costed.table, costed.static)


@pytest.fixture(scope="module")
def written(plan_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command writes: page.html, snapshot.pickle, trace.json."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.raises(SystemExit) as stop:
        main(["verify", plan_file, "--simulate", "--json", str(folder / "verify.json")])
    assert not stop.value.code
    files = [("--html", "page.html"), ("--verification", "verify.json"), ("--memory-viz", "snapshot.pickle"),
             ("--perfetto", "trace.json")]  # fmt: skip
    main(["show", plan_file, *(word for flag, name in files for word in (flag, str(folder / name)))])
    return folder


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


def test_a_page_asks_nothing_of_a_network(written: Path) -> None:
    text = (written / "page.html").read_text()
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|<link|<img|<iframe|\bsrc=|fetch\(|XMLHttp", text)


def test_a_page_says_what_the_plan_says(written: Path, plan: Plan) -> None:
    text = (written / "page.html").read_text()
    assert f"{plan.predicted.peak_bytes:,} bytes" in text
    assert f"{plan.predicted.activation_bytes:,} bytes" in text
    assert f"{plan.problem.budget_bytes:,} bytes" in text
    assert "the promise was kept" in text
    assert all(name in text for name in plan.baselines)
    assert all(found.method in text for found in plan.solver.certificates)
    found = Page(text)
    steps = [attributes["data-step"] for _, attributes in found.tags if "data-step" in attributes]
    assert sorted(map(int, steps)) == list(plan.schedule.span)
    data = json.loads(found.data)
    assert max(map(sum, data["parts"])) == sum(data["parts"][data["peak"]]) == plan.predicted.peak_bytes
    for at, parts in enumerate(data["parts"]):  # the script adds up what it lists
        sizes = [sum(data["static"].values()), 0, 0, 0, parts[4]]
        for layer, _, size, first, last in data["held"]:
            sizes[layer] += size if first <= at <= last else 0
        assert sizes == parts
    assert data["held"] == sorted(data["held"], key=lambda row: row[3])  # it stops at the first that is later


def test_a_snapshot_adds_up_and_opens_in_torch(written: Path, plan: Plan) -> None:
    snapshot = pickle.loads((written / "snapshot.pickle").read_bytes())
    (trace,) = snapshot["device_traces"]
    for kind in ("", "segment_"):
        live: dict[int, int] = {}
        sizes = []
        for event in trace:
            if event["action"] == f"{kind}alloc":
                assert event["addr"] not in live
                live[event["addr"]] = event["size"]
            elif event["action"] == (f"{kind}free" if kind else "free_completed"):
                assert live.pop(event["addr"]) == event["size"]
            sizes.append(sum(live.values()))
        assert max(sizes) == plan.predicted.peak_bytes
        assert sizes[-1] == plan.predicted.static_bytes  # parameters and the like, and the outputs
        assert sizes[-1] == sum(segment["total_size"] for segment in snapshot["segments"])
    assert all(event["frames"] for event in trace)
    times = [event["time_us"] for event in trace]
    assert times == sorted(times)
    assert "snapshot.pickle" in _memory_viz.trace_plot(snapshot)
    assert "snapshot.pickle" in _memory_viz.segment_plot(snapshot)
    lines = _memory_viz.memory(snapshot, format_flamegraph=str).splitlines()
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == plan.predicted.static_bytes
    assert "total_allocated" in _memory_viz.segsum(snapshot)
    assert "made by" in _memory_viz.memory(snapshot, format_flamegraph=str)
    assert _memory_viz.trace(snapshot)


def test_a_trace_adds_up_and_is_in_the_format(written: Path, plan: Plan, account: Account) -> None:
    document = json.loads((written / "trace.json").read_text())
    events = document["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ph", "ts", "pid", "tid"} <= set(event) for event in events)
    assert len(slices) == len(account.moments)
    assert all(event["dur"] >= 0 for event in slices)
    for track in {event["tid"] for event in slices}:
        own = [event for event in slices if event["tid"] == track]
        assert len({event["cat"] for event in own}) == 1
        for before, after in pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    end = max(event["ts"] + event["dur"] for event in slices)
    assert end == pytest.approx(plan.predicted.step_seconds * 1e6, abs=1e-2)
    counters: dict[str, list[int]] = {}
    for event in events:
        if event["ph"] == "C":
            counters.setdefault(event["name"], []).append(sum(event["args"].values()))
    assert max(counters["activations"]) == plan.predicted.activation_bytes
    assert max(counters["memory"]) == plan.predicted.peak_bytes


def texts_of(svg: str) -> list[tuple[Box, str]]:
    """Where each text of a picture is, at most."""
    found = []
    for attributes, words in re.findall(r"<text([^>]*)>([^<]*)</text>", svg):
        given = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        size = float(given.get("font-size", 11 if given.get("class") == "tick" else 12))
        width = GLYPH * size * len(words.replace("&lt;", "<").replace("&gt;", ">"))
        left = float(given["x"]) - {"start": 0, "middle": width / 2, "end": width}[given["text-anchor"]]
        found.append((Box(left, float(given["y"]) - 0.8 * size, width, size), words))
    return found


def assert_apart(picture: str) -> None:
    """No label is on another one or outside of the picture."""
    for svg in re.findall(r"<svg.*?</svg>", picture, re.S):
        (width, height) = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        found = texts_of(svg)
        for box, words in found:
            assert Box(0, 0, width, height).holds(box), words
        for (one, words), (other, others) in combinations(found, 2):
            assert not one.meets(other), f"{words!r} on {others!r}"


@pytest.mark.property
@given(
    st.lists(st.tuples(st.integers(2**10, 2**40), st.floats(1e-5, 1e3)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(2**10, 2**40), st.floats(1e-5, 1e3)), max_size=6),
    st.none() | st.integers(2**10, 2**40),
)
@examples(80)
def test_labels_of_a_frontier_are_apart(
    marks: list[tuple[int, float]], points: list[tuple[int, float]], budget: int | None
) -> None:
    names = ["plan", "none", "small", "large", "sqrt", "seed-dp", "another", "one more"]
    assert_apart(draw_frontier(Frontier(tuple(points), dict(zip(names, marks, strict=False)), budget)))


def test_a_page_about_a_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Each of its points is a plan's, and says what the plan does with every submodule."""
    path, rows = tmp_path / "page.html", tmp_path / "sweep.json"
    asked = ["--points", "9", "--memory", "8MiB", "--html", str(path), "--json", str(rows)]
    code, printed, _ = call(capsys, "sweep", *SMALL, *asked)
    assert code == 0
    assert f"page written to {path}" in printed
    text = path.read_text()
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|<link|<img|<iframe|\bsrc=|fetch\(", text)
    found, points = Page(text), json.loads(rows.read_text())["points"]
    shown = json.loads(found.data)["points"]
    targets = [attributes for tag, attributes in found.tags if "target" in (attributes.get("class") or "")]
    assert len(shown) == len(points) == len(targets)
    for point, one, target in zip(points, shown, targets, strict=True):
        assert f"({point['budget_bytes']:,} bytes)" in one["title"]
        assert f"peak {exact_size(int(point['peak_bytes']))}" in one["words"]
        assert (float(target["cx"]), float(target["cy"])) == (one["x"], one["y"])
        assert one["rows"][0][0] == "row_attention"
        for _, strategies, _ in one["rows"]:  # of every block one
            assert sum(map(int, re.findall(r"\((\d+)\)(?:,|$)", strategies))) == 2
    assert shown == sorted(shown, key=lambda one: one["x"])
    assert "budget 8 MiB" in text
    assert_apart(text)


def test_a_page_marks_what_devices_have() -> None:
    line = tuple((2**34 + step * 2**30, 10.0 - step / 8) for step in range(64))
    memories = (16 * 2**30, 24 * 2**30, 40 * 2**30)
    drawn = draw_frontier(Frontier(line, {"none": (2**36, 2.0)}, 2**35, memories), [line[3]])
    assert drawn.count('class="memory"') == 3
    assert "24 GiB" in drawn
    assert_apart(drawn)


@pytest.mark.parametrize("budget", [None, 4_700_000, 10**9])
def test_labels_of_a_timeline_are_apart(account: Account, budget: int | None) -> None:
    assert_apart(draw_memory(account, budget))


def test_a_long_and_deep_stack_is_drawn_whole() -> None:
    blocks, kinds = 130, ("attention", "a_submodule_with_a_very_long_name_that_has_no_room", "transition")
    names = [f"trunk.stack.blocks.{block}.{kind}" for block in range(blocks) for kind in kinds]
    body = Sequence(tuple(Run(step, WHOLE) for step in range(len(names))))
    for _ in range(40):
        body = Sequence((Checkpoint(body, (WHOLE,) * len(names)),))
    drawn = draw_stack(decisions(body, names))
    assert sorted(map(int, re.findall(r'data-step="(\d+)"', drawn))) == list(range(len(names)))
    assert_apart(drawn)
    # A first block that lacks a row has the order of the others.
    uneven = ["blocks.0.b", "blocks.1.a", "blocks.1.b"]
    drawn = draw_stack(decisions(Sequence(tuple(Run(step, WHOLE) for step in range(3))), uneven))
    assert drawn.index(">a</text>") < drawn.index(">b</text>")
    # Blocks that are called several times stand in the order of their calls.
    again_ = decisions(Sequence(tuple(Run(step, WHOLE) for step in range(4))), ["layer.0", "layer.1"] * 2)
    assert [cell.column for cell in again_.cells] == [0, 1, 2, 3]


def test_inference_and_missing_costs_have_a_page(plan: Plan, tmp_path: Path) -> None:
    text = page(content_of_plan(plan, None, "no times <here>"))
    assert "no times &lt;here&gt;" in text
    assert "data-step" in text
    path = tmp_path / "plan.json"
    main(["plan", *SMALL, "--mode", "inference", "--memory", "8MiB", "--out", str(path)])
    main(["show", str(path), "--html", str(tmp_path / "page.html")])
    assert load_plan(path).predicted.peak_bytes == max(
        map(sum, json.loads(Page((tmp_path / "page.html").read_text()).data)["parts"])
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--html", "{here}/no/page.html"], "does not exist"),
        (["--html", "{here}"], "is a folder"),
        (["--html", "{plan}"], "would be overwritten"),
        (["--html", "{here}/a", "--perfetto", "{here}/a"], "same file"),
        (["--memory-viz", "-"], "standard output"),
        (["--verification", "{plan}"], "add --html"),
        (["--html", "{here}/a", "--verification", "{here}/none.json"], "cannot be read"),
        (["--html", "{here}/a", "--verification", "{plan}"], "no verification"),
        (["--html", "{here}/a", "--verification", "{here}/text"], "no JSON"),
        (["--html", "{here}/a", "--verification", "{here}/other.json"], "another plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_flags_are_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture, plan_file: str, written: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    (tmp_path / "text").write_text("no JSON")
    other = json.loads((written / "verify.json").read_text()) | {"predicted_peak_bytes": 1}
    (tmp_path / "other.json").write_text(json.dumps(other))
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(here=tmp_path, plan=plan_file) for flag in flags]
    code, _, error = call(capsys, "show", plan_file, *flags)
    assert code == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def fitted() -> evoplan.Fitted:
    model, args, kwargs, loss, *_ = case("gpt", torch.float32)
    free = evoplan.fit(model, args, kwargs, loss=loss)
    peaks = free.plan.least_feasible_bytes, free.plan.predicted.peak_bytes
    free.remove()
    return evoplan.fit(model, args, kwargs, sum(peaks) // 2, loss=loss)


def test_a_fitted_model_has_its_page(fitted: evoplan.Fitted, tmp_path: Path) -> None:
    _, args, kwargs, *_ = case("gpt", torch.float32)
    fitted.report_html(tmp_path / "page.html", fitted.verify(args, kwargs))
    text = (tmp_path / "page.html").read_text()
    assert f"{fitted.plan.predicted.peak_bytes:,} bytes" in text
    assert "Predicted and measured" in text
    peak = max(map(sum, json.loads(Page(text).data)["parts"]))
    fitted.perfetto(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["peak_bytes"] == peak
    fitted.memory_viz(tmp_path / "snapshot.pickle")
    live = most = 0
    for event in pickle.loads((tmp_path / "snapshot.pickle").read_bytes())["device_traces"][0]:
        live += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
        most = max(most, live)
    assert most == peak


def test_the_file_of_a_fit_has_a_page_without_the_model(
    capsys: pytest.CaptureFixture, fitted: evoplan.Fitted, tmp_path: Path
) -> None:
    hostile = fitted.plan.model_copy(update={"model": "</script><script>alert(1)"})
    hostile.save(tmp_path / "fit.json")
    path = tmp_path / "page.html"
    assert call(capsys, "show", str(tmp_path / "fit.json"), "--html", str(path))[0] == 0
    text = path.read_text()
    assert "alert(1)" in text
    assert text.count("<script") == 2
    assert text.count("data-step") == len(fitted.plan.blocks)
    code, _, error = call(capsys, "show", str(tmp_path / "fit.json"), "--perfetto", str(tmp_path / "trace"))
    assert (code, len(error.strip().splitlines())) == (2, 1)
    assert "perfetto(path)" in error
    assert not (tmp_path / "trace").exists()


def test_a_planned_module_has_its_page(tmp_path: Path) -> None:
    stack = evoplan.EvoformerStack(TINY)
    inputs = torch.randn(1, 5, 7, TINY.c_m), torch.randn(1, 7, 7, TINY.c_z)
    planned = evoplan.apply_plan(stack, evoplan.make_plan(stack, inputs))
    planned.report_html(tmp_path / "page.html")
    assert "data-step" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="only what apply_plan returns"):
        type(planned)(stack, planned.plans[0].schedule).report_html(tmp_path / "other.html")


def test_names_do_not_end_the_script(plan: Plan, account: Account) -> None:
    names = tuple("</script><script>" for _ in account.names)
    content = replace(content_of_plan(plan, None), account=replace(account, names=names))
    text = page(content)
    assert text.count("<script") == text.count("</script>") == 2
    assert json.loads(Page(text).data)["names"] == list(names)
