"""Times of blocks measured on the model itself, for `evoplan.fit`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import evoplan
from evoplan.planner.fitting.by_hand import AGAIN
from tests.test_fit_adapters import C_Z, Block, Model, mask
from tests.zoo import case, random

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")


def test_measured_times_want_data() -> None:
    model, args = Model().to("meta"), (torch.empty(1, 16, 16, C_Z, device="meta", dtype=torch.float64),)
    given = (*args, torch.ones(1, 16, 16, device="meta", dtype=torch.float64))
    with pytest.raises(evoplan.CaptureError, match="measured where the model and its inputs lie"):
        evoplan.fit(model, given, times="measured")
    with pytest.raises(ValueError, match="choose predicted or roofline or measured"):
        evoplan.fit(model, given, times="guessed")


def test_measuring_leaves_everything_as_it_is() -> None:
    """The generator, buffers, gradients; what measured times are is told by the device alone."""

    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(16).double()

        def forward(self, z: Tensor, mask: Tensor) -> Tensor:
            return torch.dropout(self.norm(super().forward(z, mask)), 0.1, True)

    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.ModuleList(Counting() for _ in range(3))
    args = random(1, 16, 16, C_Z), mask(1, 16, 16)
    state, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fitted = evoplan.fit(model, args, times="measured")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for cost in fitted._fitting.table.options[1]:
        assert min(cost.discard_seconds, cost.forward_seconds, cost.backward_seconds) > 0


def test_a_block_that_autograd_runs_again_takes_no_longer_than_under_a_checkpoint() -> None:
    """However its times were measured: it does less."""
    fitted = case("gpt").fit(times="measured")
    found = {id(costs): costs for costs in fitted._fitting.table.options}.values()
    pairs = [(costs[0], cost) for costs in found for cost in costs if cost.strategy == AGAIN]
    assert pairs
    for whole, again in pairs:
        assert again.forward_seconds <= whole.discard_seconds
        assert again.backward_seconds <= whole.forward_seconds + whole.backward_seconds
