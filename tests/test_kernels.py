"""Kernels and lean runs: exact, as small as they say, and their work counted to the last operation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.profile import bytes_taken
from evoplan.cost_model.steps import offered_strategies, trace_step
from evoplan.cost_model.trace import Trace
from evoplan.model import Chain, EvoformerConfig, EvoformerStack
from evoplan.model.running.chain import Step
from evoplan.model.running.context import Context
from evoplan.model.running.execution import record, run_discarded
from evoplan.model.running.kernels import KERNELS, kernel, kernels_for
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.pieces import sampled_pieces
from evoplan.model.running.remake import Remaking, cheap
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.tiled import tiled_attention, tiles
from evoplan.model.running.unchanged import ChangedError
from tests.conftest import TINY, TINY_EXTRA, random_inputs, randomise

TILED = kernels_for("cpu")[0]


def attention_inputs(
    batch: tuple[int, ...] = (2,), rows: int = 3, heads: int = 2, n: int = 5, c: int = 4
) -> list[torch.Tensor]:
    """q, k, v laid out as projections leave them, a mask with whole rows missing, a bias."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(*batch, rows, n, heads, c).transpose(-2, -3).requires_grad_() for _ in range(3))
    mask = (normal(*batch, rows, n) > -0.5).double()
    mask[..., 0, :] = 0.0
    return [q, k, v, (mask - 1) * 1e9, normal(*batch, heads, n, n).requires_grad_()]


def formula(q, k, v, mask, bias):
    logits = q @ k.transpose(-1, -2) + mask[..., None, None, :]
    if bias is not None:
        logits = logits + bias.unsqueeze(-4)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tile_bytes", [1, 100, 250, 900, 10**6])
def test_tiled_is_the_formula(batch: tuple[int, ...], biased: bool, tile_bytes: int) -> None:
    q, k, v, mask, bias = attention_inputs(batch)
    bias = bias if biased else None
    leaves = [q, k, v, *([bias] if biased else [])]
    expected, got = formula(q, k, v, mask, bias), tiled_attention(q, k, v, mask, bias, tile_bytes)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    discarded = tiled_attention(*(x if x is None else x.detach() for x in (q, k, v, mask, bias)), tile_bytes)
    torch.testing.assert_close(discarded, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiled_in_half_precision_is_no_worse_than_the_formula(dtype: torch.dtype) -> None:
    inputs = attention_inputs(rows=40, n=33)
    large = torch.finfo(dtype).max / 2
    exact = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    exact[3] = inputs[3].clamp(min=-large)
    half = [x.detach().to(dtype).requires_grad_() for x in exact]
    half[3] = exact[3].to(dtype)
    wanted = [0, 1, 2, 4]

    def gradients(function, tensors):
        return torch.autograd.grad(function(*tensors).square().mean(), [tensors[i] for i in wanted])

    truth = gradients(formula, exact)
    plain = gradients(formula, half)
    tiled = gradients(lambda *x: tiled_attention(*x, tile_bytes=9000), half)
    for a, b, c in zip(truth, plain, tiled, strict=True):
        scale = a.abs().max()
        assert (c.double() - a).abs().max() / scale < 1.5 * (b.double() - a).abs().max() / scale + 1e-3


def test_tiles_cover_everything_once_and_keep_their_size() -> None:
    shape = torch.Size((2, 7, 3, 11, 4))
    for tile_bytes in (1, 44 * 2, 500, 1000, 3000, 10**6):
        seen = torch.zeros(shape[:-1], dtype=torch.int64)
        for tile in tiles(shape, torch.float32, tile_bytes):
            seen[tile] += 1
            assert seen[tile].numel() * 11 * 4 <= max(tile_bytes, 11 * 4)
        assert bool((seen == 1).all())


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize(
    ("name", "heads"), [("row_attention", 8), ("column_attention", 8), ("triangle_starting", 4)]
)
def test_full_logits_never_exist_and_little_is_kept(name: str, heads: int) -> None:
    s, r = 512, 384
    config = EvoformerConfig(n_block=1)
    kernel_name = kernels_for("cuda")[0]
    with fake_tensors(), Trace(512) as trace, sampled_pieces(trace):
        model = fake_copy(EvoformerStack(config), torch.float16).train()
        state, constants = model.prepare(
            torch.empty(1, s, r, config.c_m, dtype=torch.float16),
            torch.empty(1, r, r, config.c_z, dtype=torch.float16),
        )
        step = next(step for step in Chain.of(model).steps if step.name.endswith(name))
        tiled = replace(WHOLE, kernel=kernel_name)
        costs = {strategy: trace_step(step, strategy, state, constants, trace) for strategy in (WHOLE, tiled)}
        with Largest() as largest:
            run, output = record(step.submodule, tiled, step.tensors(state, constants, 0))
            run.vjp(torch.empty_like(output))
    rows, n = {"row": (s, r), "column": (r, s), "triangle": (r, r)}[name.partition("_")[0]]
    assert largest.elements < rows * heads * n * n / 5
    kept = costs[tiled].preserved_bytes / costs[WHOLE].preserved_bytes
    assert kept <= (0.5 if name != "triangle_starting" else 0.4)


def test_lean_keeps_less_of_every_submodule() -> None:
    table = build_cost_table(
        EvoformerStack(EvoformerConfig(n_block=1)).train(),
        {"m": (1, 16, 24, 256), "z": (1, 24, 24, 128)},
        "float32",
        device("a100-40gb"),
    )
    for options in table.options:
        kept = {str(cost.strategy): cost.preserved_bytes for cost in options}
        assert kept["lean"] < kept["whole"]


def test_remaking_survives_a_storage_at_the_same_address() -> None:
    """A tensor made where a cheap one was is not taken for it."""
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    with Remaking(Context()):
        total = x.sum() * 0
        for factor in range(1, 20):
            total = total + (cheap(torch.sin, x) * factor * x.cos()).exp().sum()
    (got,) = torch.autograd.grad(total, x)
    (expected,) = torch.autograd.grad(sum((x.sin() * f * x.cos()).exp().sum() for f in range(1, 20)), x)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_what_is_cheap_is_made_again_in_forwards_precision() -> None:
    """Backward is outside of autocast, and a normalisation may be anybody's layer, with products in it."""
    x, weight = torch.randn(2, 8, 8)
    x.requires_grad_()

    def gradient(remaking: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16), Remaking(Context()) if remaking else nullcontext():
            made = cheap(torch.matmul, x, weight)
            assert made.dtype == torch.bfloat16
            total = (made * made).float().sum()
        return torch.autograd.grad(total, x)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("read", ["by autograd", "by a recipe"])
def test_what_was_written_into_is_not_made_again_from(read: str) -> None:
    x = torch.randn(8, requires_grad=True)
    y = x * 1
    with Remaking(Context()):
        z = y if read == "by autograd" else cheap(torch.sin, y)
        total = (z * z).sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(ChangedError):
        torch.autograd.grad(total, x)


@pytest.mark.parametrize("config", [TINY, TINY_EXTRA], ids=["gated", "global"])
def test_flops_of_every_strategy_are_exact(config: EvoformerConfig) -> None:
    """Traced work against torch's counter on real runs: every submodule, strategy, kernel, phase."""
    stack = randomise(EvoformerStack(replace(config, n_block=1)).double()).train()
    inputs = random_inputs(config, s=9, r=13)
    shapes = {name: tuple(inputs[name].shape) for name in ("m", "z")}
    state, constants = stack.prepare(**{name: t.detach() for name, t in inputs.items()})
    checked = 0
    table = build_cost_table(stack, shapes, "float64", device("cpu"))
    for step, options in zip(Chain.of(stack).steps, table.options, strict=True):
        for cost in options:
            tensors = step.tensors(state, constants, 0)
            with FlopCounterMode(display=False) as discard, torch.no_grad():
                run_discarded(step.submodule, cost.strategy, tensors)
            with FlopCounterMode(display=False) as forward:
                run, output = record(step.submodule, cost.strategy, tensors)
            with FlopCounterMode(display=False) as backward:
                run.vjp(torch.ones_like(output))
            counted = tuple(c.get_total_flops() for c in (discard, forward, backward))
            traced = cost.discard_work.flops, cost.forward_work.flops, cost.backward_work.flops
            assert traced == counted, f"{step.name} under {cost.strategy}"
            checked += 1
    assert checked >= 80


def test_strategies_print_and_parse() -> None:
    step = next(iter(Chain.of(EvoformerStack(TINY)).steps))
    offered = offered_strategies(step, (1, 9, 13, TINY.c_m), tuple(KERNELS))
    assert len(set(offered)) == len(offered)
    for strategy in offered:
        assert Strategy.parse(str(strategy)) == strategy
    assert {str(LEAN), "whole", f"lean+{TILED}", f"chunk(seq, 2)+{TILED}"} <= set(map(str, offered))
    for wrong in ("whole+", "lean(2)", "chunk(seq, 2)tiled", "whole+a b"):
        with pytest.raises(ValueError, match="no strategy"):
            Strategy.parse(wrong)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'flash'; there are: eager, compiled, tiled"):
        kernel("flash")


def test_tiled_does_not_overflow_where_the_formula_does_not() -> None:
    """512 equal values of 200 and equal weights: their sum is beyond float16, their mean is not."""
    shape = (1, 1, 1, 512, 8)
    q, k = torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.float16)
    v = torch.full(shape, 200.0, dtype=torch.float16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(1, 1, 512, dtype=torch.float16)
    got, true = tiled_attention(*leaves, mask, None, 10**6), formula(*leaves, mask, None)
    torch.testing.assert_close(got, true)
    grad = torch.full_like(true, 1e-4)
    (small,) = torch.autograd.grad(got, [v], grad)
    torch.testing.assert_close(small, torch.autograd.grad(true, [v], grad)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_tiled_takes_what_was_predicted(dtype: str) -> None:
    """Casts included: of every step that attends, in real runs by the allocator."""
    config = EvoformerConfig(n_block=1, c_m=32, c_z=32).with_dropout(0.0)
    shapes = {"m": (1, 12, 20, 32), "z": (1, 20, 20, 32)}
    stack = randomise(EvoformerStack(config)).to(getattr(torch, dtype)).train()

    def tiled(step: Step, shape: tuple[int, ...]) -> list[Strategy]:
        return [found for found in offered_strategies(step, shape, (TILED,)) if found.kernel == TILED] or [
            WHOLE
        ]

    table = build_cost_table(stack, shapes, dtype, device("cpu"), strategies=tiled)
    made = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    state, constants = stack.prepare(**made)
    checked = 0
    for step, options in zip(Chain.of(stack).steps, table.options, strict=True):
        for cost in options:
            if cost.strategy.kernel == TILED:
                taken = bytes_taken(step, cost.strategy, state, constants)
                assert taken.discard <= cost.discard_bytes <= 1.01 * taken.discard + 2000, cost.strategy
                assert taken.forward <= cost.forward_bytes <= 1.01 * taken.forward + 2000, cost.strategy
                checked += 1
    assert checked >= 12
