"""Models under torch's selective checkpointing, which keeps results that the maths would write over."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from evoplan.cost_model import measure
from evoplan.model.families import EvoformerConfig
from evoplan.model.modules.evoformer import EvoformerStack
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.in_place import add_over
from evoplan.model.running.internals import keeps_results
from tests.conftest import randomise

ATEN = torch.ops.aten
KEPT = {
    "products": [ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default],
    "sums": [ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.div.Tensor, ATEN.mul.Tensor, ATEN.relu.default],
}


@pytest.mark.parametrize("kept", KEPT)
def test_gradients_are_the_plain_model_s(kept: str) -> None:
    stack = randomise(EvoformerStack(EvoformerConfig(n_block=2, c_m=8, c_z=12).with_dropout(0.0))).double()
    m, z = torch.randn(1, 5, 7, 8).double(), torch.randn(1, 7, 7, 12).double()
    mask = (torch.rand(1, 5, 7) > 0.2).double()
    parameters = list(stack.parameters())

    def gradients(run: object) -> list[Tensor]:
        return list(torch.autograd.grad(mean_square(*run(m, z, mask)), parameters))  # type: ignore[operator]

    keep = partial(create_selective_checkpoint_contexts, KEPT[kept])
    selective = partial(checkpoint, stack, use_reentrant=False, context_fn=keep)
    for ours, plain in zip(gradients(selective), gradients(stack), strict=True):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-10)


def test_elsewhere_it_writes_over() -> None:
    x = torch.ones(64, 64)
    assert not keeps_results()
    assert add_over(x, torch.ones(64, 1)) is x
    assert measure.peak_bytes(lambda: add_over(x, x)) == 0
