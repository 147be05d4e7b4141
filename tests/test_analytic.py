"""The closed formulas against the code: bytes by trace, parameters by count, FLOPs by FlopCounterMode."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evoplan.cost_model.analytic import main
from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.flops import block_flops, submodule_flops
from evoplan.cost_model.formulas import (
    BLOCK_OUTPUT,
    FORMULAS,
    NOTES_SUBMODULE_OUTPUTS,
    SUBMODULE_OUTPUTS,
    analytic_table,
    block_formulas,
    block_saved_elements,
    parameter_count,
    submodule_parameters,
)
from evoplan.cost_model.steps import StepCost, trace_step
from evoplan.cost_model.trace import Trace
from evoplan.model import PRESETS, Chain, EvoformerConfig, EvoformerStack, InputShape
from evoplan.model.modules.evoformer import mask_constants
from evoplan.model.running.execution import record
from evoplan.model.running.kinds import WHOLE
from tests.conftest import TINY, TINY_EXTRA

HALF = 2  # bytes
FINE_TUNING = PRESETS["alphafold2-finetune"].shape
# No two widths alike, so that no formula can take one for another.
UNEVEN = EvoformerConfig(
    n_block=1,
    c_m=200,
    c_z=104,
    n_head_msa=6,
    n_head_pair=5,
    c_head=24,
    c_head_msa=20,
    c_opm=28,
    c_tri=120,
    transition_factor=3,
)
UNEVEN_EXTRA = replace(UNEVEN, column_attention="global")
EXTRA = replace(PRESETS["alphafold2-extra"].config, n_block=1)
CASES = {
    "fine-tuning": (EvoformerConfig(n_block=1), FINE_TUNING),
    "initial training": (EvoformerConfig(n_block=1), PRESETS["alphafold2"].shape),
    "extra, batch of two": (EXTRA, replace(PRESETS["alphafold2-extra"].shape, batch=2)),
    "extra, fine-tuning": (EXTRA, PRESETS["alphafold2-extra-finetune"].shape),
    "uneven": (UNEVEN, InputShape(301, 257)),
    "uneven, extra": (UNEVEN_EXTRA, InputShape(301, 257)),
}


def traced_costs(config: EvoformerConfig, shape: InputShape) -> tuple[dict[str, StepCost], int]:
    """Each submodule's cost when whole, and what a block of whole runs holds, in float16."""
    stack = EvoformerStack(config).half()
    with fake_tensors(), Trace() as trace:
        chain = Chain.of(fake_copy(stack))
        m = torch.empty(shape.batch, shape.n_seq, shape.n_res, config.c_m, dtype=torch.half)
        z = torch.empty(shape.batch, shape.n_res, shape.n_res, config.c_z, dtype=torch.half)
        entry, constants = {"m": m, "z": z}, mask_constants(m, z)
        costs = {
            name: trace_step(step, WHOLE, entry, constants, trace)
            for name, step in zip(FORMULAS, chain.steps, strict=True)
        }
        before, state, runs = trace.live_bytes, dict(entry), []
        for step in chain.steps:
            run, state[step.target] = record(step.submodule, WHOLE, step.tensors(state, constants, 0))
            runs.append(run)
        return costs, trace.live_bytes - before


def test_names_are_those_of_the_block() -> None:
    names = [name for name, _ in EvoformerStack(TINY).blocks[0].submodules()]
    assert list(FORMULAS) == list(block_formulas(TINY_EXTRA)) == list(submodule_parameters(TINY)) == names
    assert list(submodule_flops(TINY, InputShape(3, 5))) == names


@pytest.mark.parametrize("case", CASES)
def test_bytes(case: str) -> None:
    """Only small terms are left out: the formulas are below the trace, by less than a hundredth.

    By a little more in the extra stack, whose m is narrow: its normalisation keeps two numbers in float32 for
    each position.
    """
    config, shape = CASES[case]
    least = 0.99 if config.column_attention == "gated" else 0.98
    costs, block_bytes = traced_costs(config, shape)
    for name, formulas in block_formulas(config).items():
        saved, forward = (f.elements(config, shape) * HALF for f in (formulas.saved, formulas.forward))
        assert least * costs[name].preserved_bytes < saved <= costs[name].preserved_bytes, name
        assert least * costs[name].forward_bytes < forward <= costs[name].forward_bytes, name
    assert least * block_bytes < block_saved_elements(config, shape) * HALF <= block_bytes
    # What is held besides the submodules' own is exactly their outputs, and not what the notes say.
    outputs = block_bytes - sum(cost.preserved_bytes for cost in costs.values())
    assert outputs == SUBMODULE_OUTPUTS.elements(config, shape) * HALF
    assert outputs < NOTES_SUBMODULE_OUTPUTS.elements(config, shape) * HALF


def test_fine_tuning_by_hand() -> None:
    """MiB in float16 at s = 512, r = 384, as docs/evoformer-memory.md has them."""
    mib = {row[:2]: row.bytes / 2**20 for row in analytic_table(EvoformerConfig(), FINE_TUNING, HALF)}
    assert {name: mib[name, "saved"] for name in FORMULAS} == {
        "row_attention": 1152 + 96 + 6 * 96 + 36,
        "column_attention": 1536 + 96 + 6 * 96,
        "msa_transition": 4 * 96 + 96,
        "outer_product_mean": 288 + 96 + 2 * 12,
        "triangle_outgoing": 13 * 36,
        "triangle_incoming": 13 * 36,
        "triangle_starting": 432 + 36 + 6 * 36,
        "triangle_ending": 432 + 2 * 36 + 6 * 36,
        "pair_transition": 4 * 36 + 36,
    }
    assert [mib[name, "notes"] for name in FORMULAS] == [1152, 1536, 384, 288, 36, 36, 432, 432, 144]
    assert all(mib[name, "notes"] < 0.75 * mib[name, "forward"] for name in FORMULAS)
    assert [mib[name, "output"] for name in FORMULAS] == [96, 96, 96] + 6 * [36]
    assert BLOCK_OUTPUT.elements(EvoformerConfig(), FINE_TUNING) * HALF / 2**20 == 96 + 36
    assert block_saved_elements(EvoformerConfig(), FINE_TUNING) * HALF / 2**20 == 7980


@pytest.mark.parametrize(
    "config",
    [EvoformerConfig(n_block=1), EXTRA, TINY, UNEVEN, UNEVEN_EXTRA],
    ids=["default", "extra", "tiny", "uneven", "uneven-extra"],
)
def test_parameters(config: EvoformerConfig) -> None:
    block = EvoformerStack(config).blocks[0]
    counts = {name: sum(p.numel() for p in submodule.parameters()) for name, submodule in block.submodules()}
    assert submodule_parameters(config) == counts
    assert parameter_count(config) == sum(counts.values())


def test_parameters_of_alphafold2() -> None:
    assert parameter_count(EvoformerConfig()) == 1_829_952
    assert parameter_count(EXTRA) == 701_312


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TINY, InputShape(5, 7)),
        (UNEVEN, InputShape(9, 11, batch=2)),
        (TINY_EXTRA, InputShape(5, 7)),
        (UNEVEN_EXTRA, InputShape(9, 11, batch=2)),
    ],
    ids=["tiny", "uneven", "tiny-extra", "uneven-extra"],
)
def test_flops(config: EvoformerConfig, shape: InputShape) -> None:
    chain = Chain.of(EvoformerStack(config))
    m = torch.randn(shape.batch, shape.n_seq, shape.n_res, config.c_m)
    z = torch.randn(shape.batch, shape.n_res, shape.n_res, config.c_z)
    state, constants = {"m": m, "z": z}, mask_constants(m, z)
    total = [0, 0]
    for step, (name, flops) in zip(chain.steps, submodule_flops(config, shape).items(), strict=False):
        with FlopCounterMode(display=False) as forward:
            run, output = record(step.submodule, WHOLE, step.tensors(state, constants, 0))
        with FlopCounterMode(display=False) as backward:
            run.vjp(torch.randn_like(output))
        counted = forward.get_total_flops(), backward.get_total_flops()
        assert flops == counted, name
        total = [a + b for a, b in zip(total, counted, strict=True)]
    assert block_flops(config, shape) == tuple(total)


def test_command_prints_the_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main([])
    printed = capsys.readouterr().out
    for text in ("h s² r + s r (c_m + 6 h c)", "7,996.2", "1,829,952"):
        assert text in printed


def test_command_refuses_no_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seq", "0"])
    assert "n_seq must be a whole number of at least 1" in capsys.readouterr().err


def test_needs_no_torch() -> None:
    code = "import sys, cost_model.analytic, cost_model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
