"""What plans are compared with: the registry, gradients, failures, and rows that are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from evoplan.experiments.peers import registry
from evoplan.experiments.peers.__main__ import peers
from evoplan.experiments.peers.by_hand import ByHand
from evoplan.experiments.peers.comparing import Comparison, compare
from evoplan.experiments.peers.registry import Peer, UnavailableError, all_peers, chosen
from evoplan.experiments.peers.report import draw, leasts, line
from evoplan.experiments.peers.results import Document, Row, Times, read, resumed
from evoplan.experiments.peers.selective import Result, greedy
from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.problems.problem import Problem

CHEAP = "plain", "block", "sqrt", "sqrt>block", "submodule", "selective", "seed-dp", "greedy"
# Of many small operators, which a profiler takes long for.
DEAR = "block>submodule", "pair>block>submodule+8", "openfold", "selective-batched", "evoplan-least"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    config = EvoformerConfig(n_block=2, c_m=8, c_z=12).with_dropout(0.0)
    problem = Problem(
        model="alphafold2", config=config, shape=InputShape(5, 7), dtype="float64", optimizer="none"
    )
    return Comparison(problem, None, 0, lambda text: None, times="roofline")


def document(**changed: Any) -> Document:
    about: dict[str, Any] = {
        "torch": "2", "device": "cpu", "blocks": 3, "s": 5, "r": 7, "widths": "small", "precision": "fp32",
        "rounds": 0,
    }  # fmt: skip
    return Document(**{**about, **changed})


@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(n, marks=pytest.mark.slow) for n in DEAR)])
def test_gradients_are_the_plain_model_s(comparison: Comparison, name: str) -> None:
    peer = all_peers()[name]
    share = max(peer.budgets, default=None)
    row = comparison.row(peer, share)
    assert (row.status, row.reason) == ("ok", None)
    assert row.gradient_error is not None
    assert row.gradient_error < 1e-10
    assert row.peak_bytes is not None
    assert row.peak_bytes <= comparison.setting.plain_peak_bytes
    if row.ours is not None and row.ours.reason is None:
        assert row.ours.peak_bytes is not None
        assert row.ours.peak_bytes <= row.peak_bytes + 4096


def test_every_peer_says_what_it_is() -> None:
    assert len(all_peers()) >= 25
    for peer in all_peers().values():
        assert peer.about
        assert peer.source
        assert bool(peer.budgets) == (peer.unit is not None)
    assert [peer.name for peer in chosen(["block", "plain"])] == ["plain", "block"]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already"):
        registry.register(all_peers()["plain"])


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(peers, "peers", ["--only", "plain,nobody"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "'nobody'" in said
    assert "plain" in said


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(peers, "peers", ["--list"])
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in all_peers())


def test_what_fails_is_listed_with_its_reason(comparison: Comparison) -> None:
    def raising(error: Exception) -> Peer:
        def apply(setting: object, budget: float | None) -> nn.Module:
            raise error

        return Peer("failing", "fails", "here", "automatic", apply)

    for error, reason in (
        (ImportError("No module named 'pulp'"), "No module named 'pulp'; install it with"),
        (UnavailableError("there is no compiler"), "there is no compiler"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
    ):
        row = comparison.row(raising(error), None)
        assert row.status == "failed"
        assert row.reason is not None
        assert row.reason.startswith(reason)
        assert len(line(row).splitlines()) == 1


def test_a_wrong_gradient_is_said(comparison: Comparison) -> None:
    class Wrong(ByHand):
        def forward(self, *tensors: Tensor, **named: Any) -> tuple[Tensor, ...]:
            m, z = super().forward(*tensors, **named)
            return m, z + 0.1 * (z - z.detach())

    peer = Peer("wrong", "a gradient too large", "here", "hand", lambda setting, _: Wrong(setting.stack))
    row = comparison.row(peer, None)
    assert row.status == "wrong"
    assert "gradient" in (row.reason or "")
    found = document(rows=[row])
    assert leasts(found)["by hand"] is None


def test_rows_come_back_and_are_skipped(tmp_path: Path) -> None:
    path, made = tmp_path / "peers.json", []

    def row(peer: Peer, share: float | None) -> Row:
        made.append((peer.name, share))
        times = Times.of([1.0, 2.0, 3.0])
        about: dict[str, Any] = {"about": "a", "source": "b", "kind": "hand"}
        return Row(name=peer.name, share=share, peak_bytes=9, seconds=times, **about)

    stub: Any = SimpleNamespace(row=row, static_bytes=1, setting=SimpleNamespace(plain_peak_bytes=2))
    first = document()
    compare(first, stub, chosen(["plain", "greedy"]), lambda row: first.write(path))
    assert read(path) == first
    assert len(made) == 5
    again = resumed(path, document())
    compare(again, stub, chosen(["plain", "block", "greedy"]), lambda row: None)
    assert made[5:] == [("block", None)]
    draw(again, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_another_comparison_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    document().write(path)
    with pytest.raises(ValueError, match=r"another comparison .*rounds 0"):
        resumed(path, document(rounds=5))
    path.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="no comparison"):
        resumed(path, document())


def test_greedy_keeps_the_most_seconds_per_byte() -> None:
    results = [Result(0, 100, 1.0), Result(1, 10, 1.0), Result(2, 0, 5.0), Result(3, 50, 4.0)]
    assert greedy(results, 2, 130) == [{1, 3}, {1, 3}]
    assert greedy(results, 2, 20) == [{1}, {1}]
    assert greedy(results, 2, 10**6) == [{0, 1, 3}] * 2
    assert greedy(results, 2, 0) == [set(), set()]


def test_compiled_peers_are_asked_for_fractions() -> None:
    peer = all_peers()["memory-budget-block"]
    assert peer.budget(0.1, 1000) == 0.1
    assert all_peers()["evoplan"].budget(0.1, 1000) == 100
