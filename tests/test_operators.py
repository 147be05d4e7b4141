"""What operators take forward and backward, as traced without data, against the CPU's allocator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import real_tensors_too
from evoplan.cost_model.measure import peak_bytes
from evoplan.cost_model.simulation import simulated
from evoplan.model.foreign.leaves import Layout

IMAGE, BATCH, ROWS = (2, 8, 20, 24), (9, 40, 40), (60, 24)
ONES = torch.ones(BATCH)
POINTS = torch.arange(960).view(2, 20, 24) % 3
CLASSES = torch.arange(60) % 24

CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    # Losses: what is reduced, and what their result keeps.
    "mse": (lambda x: F.mse_loss(x, ONES), (BATCH,)),
    "mse of a sum": (lambda x: F.mse_loss(x, ONES, reduction="sum"), (BATCH,)),
    "mse of unlike shapes": (lambda x, y: F.mse_loss(x, y.expand(BATCH)), (BATCH, (40, 40))),
    "squares": (lambda x: F.mse_loss(x, ONES, reduction="none"), (BATCH,)),
    "l1": (lambda x: F.l1_loss(x, ONES), (BATCH,)),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, ONES), (BATCH,)),
    "huber": (lambda x: F.huber_loss(x, ONES), (BATCH,)),
    "soft margin": (lambda x: F.soft_margin_loss(x, ONES), (BATCH,)),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), ONES), (BATCH,)),
    "bce of logits": (lambda x: F.binary_cross_entropy_with_logits(x, ONES), (BATCH,)),
    "cross entropy": (lambda x: F.cross_entropy(x, CLASSES), (ROWS,)),
    "margins": (lambda x: F.multi_margin_loss(x, CLASSES), (ROWS,)),
    # Kernels with scratch of their own.
    "bilinear": (F.bilinear, (ROWS, ROWS, (10, 24, 24))),
    "distances": (torch.cdist, (ROWS, ROWS)),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), (IMAGE,)),
    "fold": (lambda x: F.fold(x, (20, 24), 3, padding=1), ((2, 72, 480),)),
    "k-th value": (lambda x: x.kthvalue(3, 1)[0], (BATCH,)),
    "exponential": (lambda x: torch.matrix_exp(x / 40), (BATCH,)),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x @ x.mT), (BATCH,)),
    "inverse": (lambda x: torch.linalg.inv(x + 50 * torch.eye(40)), (BATCH,)),
    "grid sample": (lambda x, at: F.grid_sample(x, at, align_corners=False), (IMAGE, (2, 9, 9, 2))),
    "group norm": (lambda x: F.group_norm(x.transpose(2, 3), 4), (IMAGE,)),
    "attention": (F.scaled_dot_product_attention, ((2, 4, 33, 16),) * 3),
    "attention of operators": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(33, 33).tril().bool()),
        ((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 8)),
    ),
    # What lies otherwise than kernels read it.
    "classes of points": (
        lambda x: F.cross_entropy(x.permute(0, 3, 1, 2), POINTS, ignore_index=2),
        ((2, 20, 24, 3),),
    ),
    "resized": (
        lambda x: F.interpolate(x.permute(0, 3, 1, 2), size=(40, 48), mode="bilinear").permute(0, 2, 3, 1),
        ((2, 20, 24, 8),),
    ),
    "batch norm": (
        lambda x: F.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True),
        ((2, 20, 24, 8),),
    ),
    "transform": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), (BATCH,)),
    "rotation": (lambda x: torch.view_as_real(torch.view_as_complex(x).square()), ((9, 40, 2),)),
}


def forward(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    run(*inputs)


def step(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    loss = run(*inputs).square().mean()
    loss.backward()


def measured_and_traced(
    what: Callable[..., None], run: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> tuple[int, int]:
    """Peaks of a forward or a step, its inputs' gradients being there."""
    step(run, inputs)
    measured = peak_bytes(lambda: what(run, inputs))
    with simulated(device("cpu")) as trace, real_tensors_too():
        imagined = tuple(Layout.of(tensor).empty().requires_grad_() for tensor in inputs)
        for tensor in imagined:
            tensor.grad = torch.empty_like(tensor)
        before = trace.live_bytes
        trace.reset()
        what(run, imagined)
        return measured, trace.peak_bytes - before + trace.kept_number_bytes


@pytest.mark.parametrize("what", [forward, step])
@pytest.mark.parametrize("name", CASES)
def test_operators_take_what_is_traced(name: str, what: Callable[..., None]) -> None:
    torch.manual_seed(0)
    run, shapes = CASES[name]
    inputs = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    measured, traced = measured_and_traced(what, run, inputs)
    assert 0.95 * traced - 64 <= measured <= traced


def test_an_lstm_keeps_what_its_kernel_does() -> None:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = x.new_zeros(1, 5, 24)
        return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, True)[0]

    weights = nn.LSTM(16, 24).parameters()
    measured, traced = measured_and_traced(step, run, (torch.randn(5, 40, 16, requires_grad=True), *weights))
    assert 0.98 * traced <= measured <= 1.005 * traced
