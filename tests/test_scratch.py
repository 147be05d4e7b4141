"""Traced peaks, scratch included, against what the CPU's allocator hands out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from evoplan.cost_model import scratch
from evoplan.cost_model.costs import LOSS_NUMBERS, NUMBER_BYTES
from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.measure import peak_bytes, usage
from evoplan.cost_model.scratch import Call, CpuScratch
from evoplan.cost_model.steps import StepCost, trace_step
from evoplan.cost_model.tensor_spec import TensorSpec
from evoplan.cost_model.trace import Trace
from evoplan.model import Chain, EvoformerConfig, EvoformerStack
from evoplan.model.modules.evoformer import mask_constants
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.execution import record, run_discarded
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.pieces import sampled_pieces
from evoplan.model.running.strategy import Strategy

CONFIG = EvoformerConfig(n_block=1, c_m=32, c_z=32)
STRATEGIES = [
    ("row_attention", Strategy("coshard", "head", 4)),
    ("msa_transition", WHOLE),
    ("triangle_outgoing", Strategy("chunk", "row", 2)),
]
EXTRA = replace(CONFIG, c_head_msa=8, column_attention="global")
EXTRA_STRATEGIES = [
    ("column_attention", strategy)
    for strategy in (WHOLE, Strategy("chunk", "res", 4), Strategy("coshard", "head", 4))
]
CASES = pytest.mark.parametrize(
    ("config", "strategies"), [(CONFIG, STRATEGIES), (EXTRA, EXTRA_STRATEGIES)], ids=["main", "extra"]
)


def chain_and_state(stack: EvoformerStack) -> tuple[Chain, dict[str, Tensor], dict[str, Tensor]]:
    dtype = next(stack.parameters()).dtype
    m = torch.zeros(1, 29, 53, CONFIG.c_m, dtype=dtype)
    z = torch.zeros(1, 53, 53, CONFIG.c_z, dtype=dtype)
    return Chain.of(stack), {"m": m, "z": z}, mask_constants(m, z)


def predicted(stack: EvoformerStack, strategies: list[tuple[str, Strategy]]) -> list[StepCost]:
    with fake_tensors(), Trace(scratch=CpuScratch()) as trace, sampled_pieces(trace):
        chain, state, constants = chain_and_state(fake_copy(stack))
        steps = {step.name.split(".")[-1]: step for step in chain.steps}
        return [trace_step(steps[name], strategy, state, constants, trace) for name, strategy in strategies]


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_peaks_are_the_allocators(dtype, config, strategies):
    stack = EvoformerStack(config).to(dtype).train()
    chain, state, constants = chain_and_state(stack)
    steps = {step.name.split(".")[-1]: step for step in chain.steps}
    for (name, strategy), cost in zip(strategies, predicted(stack, strategies), strict=True):
        step, held = steps[name], []

        def discard(step=step, strategy=strategy):
            with torch.no_grad():
                run_discarded(step.submodule, strategy, step.tensors(state, constants, 0))

        def forward(step=step, strategy=strategy, held=held):
            held.append(record(step.submodule, strategy, step.tensors(state, constants, 0))[0])

        grad = torch.zeros_like(state[step.target])
        discard_bytes, forward_bytes = peak_bytes(discard), peak_bytes(forward)
        gradients = sum(tensor.nbytes for tensor in state.values())
        backward_bytes = peak_bytes(lambda held=held, grad=grad: held.pop().vjp(grad))
        # Live before backward starts: what the record preserves and the gradients of the state.
        backward_bytes += cost.preserved_bytes + gradients
        for measured, traced in (
            (discard_bytes, cost.discard_bytes),
            (forward_bytes, cost.forward_bytes),
            (backward_bytes, cost.backward_bytes),
        ):
            # The loss is live around a step of a chain, and not here.
            assert 0.97 * traced <= measured + LOSS_NUMBERS * NUMBER_BYTES <= traced, (name, strategy, dtype)


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That torch runs operators on, so many; everything else here has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_normalisations_take_rows_for_every_thread(threads: int, dtype: torch.dtype) -> None:
    """Though forward takes none, whatever the threads."""
    x, row = TensorSpec.dense((40, 30, 96), dtype), TensorSpec.dense((96,), dtype)
    statistics = TensorSpec.dense((40, 30, 1), dtype)
    known, aten = CpuScratch(), torch.ops.aten
    forward = Call(aten.native_layer_norm.default, (x, (96,), row, row, 1e-5))
    backward = Call(
        aten.native_layer_norm_backward.default,
        (x, x, (96,), statistics, statistics, row, row, (True, True, True)),
    )
    for call, expected in ((forward, 0), (backward, 2 * threads * row.nbytes)):
        assert scratch._run(call) == expected
        assert known.bytes(call) == expected + scratch.NUMBER_BYTES


@pytest.mark.parametrize(
    ("stride", "copied"),
    [((3000, 50, 1), 0), ((3000, 1, 60), 0), ((6000, 100, 2), 1), ((1, 200, 4), 1)],
    ids=["by rows", "by columns", "gaps", "gaps, the batch innermost"],
)
def test_a_matrix_with_gaps_is_copied(stride: tuple[int, ...], copied: int) -> None:
    """One of the batch at a time, where neither its rows nor its columns are without gaps."""
    left = TensorSpec.dense((4, 60, 50), torch.float32, stride)
    right = TensorSpec.dense((4, 50, 70), torch.float32)
    call = Call(torch.ops.aten.bmm.default, (left, right))
    expected = copied * left.nbytes // 4
    assert scratch._run(call) == expected
    assert CpuScratch().bytes(call) == expected + scratch.NUMBER_BYTES


def test_large_products_are_not_run(monkeypatch):
    run = []
    monkeypatch.setattr(scratch, "_run", lambda call: run.append(call) or 1000)
    monkeypatch.setattr(scratch, "_measured", {})
    monkeypatch.setattr(CpuScratch, "_is_onednn", lambda self, call: True)
    with fake_tensors():
        left = torch.empty(64, 9000, 7000, dtype=torch.bfloat16)[..., :6000]
        right = torch.empty(64, 500, 6000, dtype=torch.bfloat16).transpose(1, 2)
        known = CpuScratch()
        call = known.call(torch.ops.aten.bmm.default, (left, right))
        # A factor with gaps is copied whole.
        assert known.bytes(call) == 1000 + 64 * 9000 * 6000 * 2 + scratch.NUMBER_BYTES
    (small,) = run
    (batch, rows, inner), (_, _, columns) = (tensor.shape for tensor in small.tensors)
    assert 2 * prod((batch, rows, inner, columns)) <= scratch.MAX_FLOPS
    assert sum(tensor.nbytes for tensor in small.tensors) <= scratch.MAX_BYTES
    assert small.tensors[0].is_contiguous
    assert small.tensors[1].transposed.is_contiguous
    assert rows & (rows - 1) == inner & (inner - 1) == 0


def test_devices_without_scratch_are_traced_without():
    with fake_tensors(), Trace() as plain:
        a = torch.empty(100, 100, dtype=torch.bfloat16)
        plain.reset()
        a @ a
    assert plain.peak_bytes == 2 * a.nbytes


@pytest.mark.parametrize(
    ("shape", "stride", "seen"),
    [
        ((1, 6, 3), (18, 1, 6), (1, 6, 3)),
        ((1, 1, 6, 3), (18, 18, 1, 6), (1, 1, 6, 3)),
        ((4, 1, 3), (1, 12, 4), (4, 1, 3)),
        ((1, 6, 3), (18, 3, 1), (1, 18)),
        ((3, 1), (1, 3), (3, 1)),
    ],
)
def test_views_have_the_strides_of_real_ones(shape, stride, seen):
    """Packing depends on them, also on those of dimensions of one element."""
    real = torch.zeros(18).as_strided(shape, stride).view(seen)
    with fake_tensors(), Trace(scratch=CpuScratch()):
        traced = torch.zeros(18).as_strided(shape, stride).view(seen)
    assert traced.stride() == real.stride()


def test_numbers_that_autograd_keeps() -> None:
    """A Python number by which a weight is scaled is kept as a tensor, also where the product is not."""

    def scaled(weight: Tensor) -> Tensor:
        return (weight * 0.5).bfloat16()

    weight, kept = torch.ones(16, requires_grad=True), []
    left = usage(lambda: kept.append(scaled(weight))).left - kept[0].nbytes
    with fake_tensors(), Trace(scratch=CpuScratch()) as trace:
        fake = torch.empty(16, requires_grad=True)
        with torch.no_grad():
            scaled(fake)
        assert trace.kept_number_bytes == 0
        found = scaled(fake)
        assert trace.live_bytes - fake.nbytes - found.nbytes + trace.kept_number_bytes == left == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_makes_its_gradient_and_numbers(dtype: torch.dtype) -> None:
    """In bfloat16 a product of vectors would take 64 KiB for each thread."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    numbers = LOSS_NUMBERS * NUMBER_BYTES
    assert peak_bytes(lambda: mean_square(x)) <= numbers
    expected = x.detach().double().square().sum() / 5000**0.5
    assert float(mean_square(x).detach().double() / expected) == pytest.approx(
        1, rel=8 * torch.finfo(dtype).eps
    )
    loss = mean_square(x)
    assert peak_bytes(lambda: torch.autograd.grad(loss, x)) <= x.nbytes + numbers
