"""The two column attentions in float16, where masks and long columns are near the dtype's range."""

from __future__ import annotations

import pytest
import torch

from evoplan.model import EvoformerConfig, EvoformerStack
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.runs import WholeRun
from evoplan.model.running.submodule import Submodule
from tests.conftest import TINY, TINY_EXTRA, randomise

CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_EXTRA], ids=["gated", "global"])


def column_attention(config: EvoformerConfig) -> Submodule:
    return randomise(EvoformerStack(config).half()).blocks[0].column_attention


@CONFIGS
def test_a_column_without_sequences_stays_finite(config: EvoformerConfig) -> None:
    m, msa_mask = torch.randn(5, 7, config.c_m).half(), torch.ones(5, 7).half()
    msa_mask[:, 2] = 0
    run = WholeRun(column_attention(config), WHOLE, {"m": m, "msa_mask": msa_mask})
    output = run.take_output()
    state, parameters = run.vjp(torch.ones_like(output))
    for name, tensor in {"output": output, **state, **parameters}.items():
        assert tensor.isfinite().all(), name


def test_the_mean_query_of_a_long_column_stays_finite() -> None:
    """The sum of 5,120 normalised entries of 20 is beyond float16; their mean is 20."""
    attention = column_attention(TINY_EXTRA)
    with torch.no_grad():
        attention.norms["m"].weight.zero_()
        attention.norms["m"].bias.fill_(20)
        m = torch.randn(5120, 1, TINY.c_m).half()
        output = attention.new_target({"m": m, "msa_mask": torch.ones(5120, 1).half()})
        few = attention.new_target({"m": m[:3], "msa_mask": torch.ones(3, 1).half()})
    assert output.isfinite().all()
    # All sequences are alike once normalised, so their number does not matter.
    torch.testing.assert_close(output[:3], few, rtol=0.01, atol=0.01)


@CONFIGS
def test_starts_as_the_identity_with_open_gates(config: EvoformerConfig) -> None:
    """Suppl. 1.11.4."""
    attention = EvoformerStack(config).blocks[0].column_attention
    m = torch.randn(5, 7, config.c_m)
    assert torch.equal(attention.new_target({"m": m, "msa_mask": torch.ones(5, 7)}), m)
    gates = [p for name, p in attention.named_parameters() if name.endswith("linear_g.bias")]
    assert [gate.unique().tolist() for gate in gates] == [[1.0]]


def test_column_attention_has_two_names() -> None:
    with pytest.raises(ValueError, match="column_attention must be 'gated' or 'global', not 'sparse'"):
        EvoformerConfig(column_attention="sparse")
