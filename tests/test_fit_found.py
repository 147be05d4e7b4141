"""Which modules are planned, and which are left to the model: what is said of them, and what they give."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evoplan

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def check(model: nn.Module, x: Tensor, blocks: set[str]) -> evoplan.Fitted:
    """That these are planned, with the gradients of the model itself, at the least budget and at the most."""
    model, x = model.double(), x.double()
    expected = gradients(copy.deepcopy(model), x)
    fitted = evoplan.fit(model, (x,))
    assert {call.path for call in fitted._fitting.captured.calls} == blocks
    for budget in (fitted.plan.least_feasible_bytes, None):
        fitted.replan(budget)
        torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=1e-10)
        found = fitted.verify((x,))
        assert found.ok
        assert 0.98 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0
    return fitted


class Embedded(Tower):
    """Of a size that its blocks do not take its place among others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.embed(x))


class Distilled(nn.Module):
    """A frozen teacher beside a student of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = Embedded(), Embedded()
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x) - wanted


def test_a_frozen_twin_is_none_of_the_blocks() -> None:
    torch.manual_seed(0)
    check(Distilled(), torch.randn(50, 9, WIDTH), {f"student.blocks.{at}" for at in range(3)})


class Message(nn.Module):
    """Two networks, as of a graph's edges and of its nodes, with sums between them."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Sequential(nn.Linear(2 * WIDTH, 32), nn.SiLU(), nn.Sequential(nn.Linear(32, WIDTH)))
        self.nodes = nn.Sequential(nn.Linear(2 * WIDTH, 32), nn.SiLU(), nn.Sequential(nn.Linear(32, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.cat([x.unsqueeze(0).expand(len(x), -1, -1), x.unsqueeze(1).expand(-1, len(x), -1)], -1)
        return x + self.nodes(torch.cat([x, self.edges(pairs).sum(1)], -1))


def test_blocks_made_of_sequentials_stay_whole() -> None:
    torch.manual_seed(0)
    model = Tower(0)
    model.blocks.extend(Message() for _ in range(3))
    check(model, torch.randn(61, WIDTH), {f"blocks.{at}" for at in range(3)})


@dataclass
class Frame:
    """What a block may change."""

    x: Tensor


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, frame: Frame) -> Frame:
        return Frame(frame.x + self.mix(frame.x))


class Structure(nn.Module):
    """A trunk that can be planned, and blocks after it that cannot."""

    def __init__(self, turns: int = 3) -> None:
        super().__init__()
        self.trunk, self.turns = Tower(), nn.ModuleList(Turns() for _ in range(turns))

    def forward(self, x: Tensor) -> Tensor:
        frame = Frame(self.trunk(x))
        for turn in self.turns:
            frame = turn(frame)
        return frame.x


def test_blocks_that_cannot_be_planned_are_left_where_others_can() -> None:
    torch.manual_seed(0)
    blocks = {f"trunk.blocks.{at}" for at in range(3)} | {"turns.0.mix"}  # it follows them as one more
    fitted = check(Structure(), torch.randn(50, 9, WIDTH), blocks)
    assert any("Turns are left as they are: turns.0 is given a Frame" in note for note in fitted.plan.notes)


def test_blocks_that_cannot_be_planned_are_said_where_others_are_few() -> None:
    with pytest.raises(evoplan.CaptureError, match=r"turns\.0 is given a Frame"):
        evoplan.fit(Structure(60), (torch.randn(50, 9, WIDTH),))


class Checkpointed(Block):
    """As transformers has its own checkpointing: within the forward of a block, and around all of it."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return found


def test_checkpoints_around_all_of_a_block_are_to_be_turned_off() -> None:
    model = Tower(0)
    model.blocks.extend(Checkpointed() for _ in range(3))
    with pytest.raises(evoplan.CaptureError, match="turn the model's own checkpointing off"):
        evoplan.fit(model, (torch.randn(50, 9, WIDTH),))


class Looks(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_where_values_are_looked_at_is_said() -> None:
    model = Tower(0)
    model.blocks.extend(Looks() for _ in range(3))
    with pytest.raises(
        evoplan.CaptureError, match=r"looks at the values .*at test_fit_found\.py, line \d+\)"
    ):
        evoplan.fit(model, (torch.randn(50, 9, WIDTH),))


def test_a_leaf_that_a_hook_makes_is_the_models_own() -> None:
    """As `enable_input_require_grads` of transformers does, for adapters above frozen embeddings."""

    def cut(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.requires_grad_()

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(3)))
    model[0].requires_grad_(False).register_forward_hook(cut)
    check(model, torch.randn(50, 9, WIDTH), {"0", "1", "2", "3"})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_take_what_is_predicted(kind: type[nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = kind(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.layer(x)[0])

    model, x = Tower(0), torch.randn(5, 40, WIDTH)
    model.blocks.extend(Recurrent() for _ in range(3))
    fitted = evoplan.fit(model, (x,), optimizer="none")
    for budget in (fitted.plan.least_feasible_bytes, None):
        fitted.replan(budget)
        found = fitted.verify((x,))
        assert found.ok
        assert 0.98 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.0
