"""Fitted models beside every block checkpointed by hand: peaks and times on one meter, rounds interleaved.

    python -m evoplan.experiments.fits [--rounds 9] [--json PATH] [names ...]

Models are the originals' own code, eight blocks each. By hand: torch.utils.checkpoint around every block.
Peaks are above parameters, gradients and inputs. Plans are made with times measured on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evoplan
from evoplan.cost_model import measure
from evoplan.experiments.interleaved import interleaved
from evoplan.model.running.internals import other_forwards
from evoplan.planner.commands.flags import json_option
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.fitting.plan import FitPlan

BLOCKS = 8


class Given(NamedTuple):
    """A model, what it is called with, its loss, and its blocks."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]
    blocks: nn.ModuleList


def pairformer() -> Given:
    """OpenFold-3's, r=64."""
    from openfold3.core.model.latent.pairformer import PairFormerStack

    model = PairFormerStack(
        c_s=96, c_z=64, c_hidden_pair_bias=24, no_heads_pair_bias=4, c_hidden_mul=64, c_hidden_pair_att=16,
        no_heads_pair=4, no_blocks=BLOCKS, transition_type="swiglu", transition_n=4, pair_dropout=0.25,
        fuse_projection_weights=False, blocks_per_ckpt=None, inf=1e9,
    )  # fmt: skip
    masks = {"single_mask": torch.ones(1, 64), "pair_mask": torch.ones(1, 64, 64)}
    args = torch.randn(1, 64, 96), torch.randn(1, 64, 64, 64)
    return Given(model.train(), args, masks, _squares, model.blocks)


def evoformer() -> Given:
    """OpenFold-3's, s=32, r=48."""
    from openfold3.core.model.latent.evoformer import EvoformerStack

    model = EvoformerStack(
        c_m=64, c_z=64, c_hidden_msa_att=16, c_hidden_opm=16, c_hidden_mul=64, c_hidden_pair_att=16, c_s=64,
        no_heads_msa=4, no_heads_pair=4, no_blocks=BLOCKS, transition_type="relu", transition_n=4,
        msa_dropout=0.15, pair_dropout=0.25, no_column_attention=False, opm_first=False,
        fuse_projection_weights=False, blocks_per_ckpt=None, inf=1e9, eps=1e-3,
    )  # fmt: skip
    masks = {"msa_mask": torch.ones(1, 32, 48), "pair_mask": torch.ones(1, 48, 48)}
    args = torch.randn(1, 32, 48, 64), torch.randn(1, 48, 48, 64)
    return Given(model.train(), args, masks, _squares, model.blocks)


def llama() -> Given:
    """Of transformers, 8 x 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500, hidden_size=192, intermediate_size=512, num_hidden_layers=BLOCKS,
        num_attention_heads=6, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config), torch.randint(500, (8, 256))
    kwargs = {"input_ids": tokens, "labels": tokens}
    return Given(model.train(), (), kwargs, lambda out: out.loss, model.model.layers)


def bert() -> Given:
    """Of transformers, with dropout, 8 x 256 tokens."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=500, hidden_size=192, intermediate_size=768, num_hidden_layers=BLOCKS,
        num_attention_heads=6,
    )  # fmt: skip
    model, tokens = BertForMaskedLM(config), torch.randint(500, (8, 256))
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return Given(model.train(), (), kwargs, lambda out: out.loss, model.bert.encoder.layer)


MODELS = {"pairformer": pairformer, "evoformer": evoformer, "llama": llama, "bert": bert}


def _squares(out: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([tensor.square().mean() for tensor in out]).sum()


def checkpointed(blocks: nn.ModuleList) -> AbstractContextManager[None]:
    """Every block under torch.utils.checkpoint, as people do it by hand."""
    return other_forwards({block: _checkpointed(block.forward) for block in blocks})


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compare(given: Given, rounds: int) -> dict[str, Any]:
    """Least peak, and time at the peak of checkpointing by hand, over those of checkpointing by hand."""

    step = partial(_step, given)

    def brief_step() -> None:
        given.loss(given.model(*given.args, **given.kwargs)).backward()

    for parameter in given.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with checkpointed(given.blocks):
        step()
        by_hand, by_hand_brief = measure.peak_bytes(step), measure.peak_bytes(brief_step)
    fitted = evoplan.fit(given.model, given.args, given.kwargs, loss=given.loss, times="measured")
    static = fitted.plan.predicted.static_bytes
    least = fitted.plan.least_feasible_bytes
    fitted.replan(least)
    step()
    least_measured, least_brief = measure.peak_bytes(step), measure.peak_bytes(brief_step)
    fitted.replan(None)
    free = fitted.plan
    fitted.replan(max(least, static + by_hand))
    peak = measure.peak_bytes(step)
    predicted = fitted.plan.predicted.peak_bytes - static
    plan = fitted.plan
    fitted.remove()
    times = _timed(given, {"plan": plan, "free": free}, rounds)
    ratios = sorted(a / b for a, b in zip(times["plan"], times["by hand"], strict=True))
    of_free = sorted(a / b for a, b in zip(times["free"], times["plain"], strict=True))
    return {
        "by_hand_bytes": by_hand,
        "least_bytes": least_measured,
        "least_over_by_hand": least_measured / by_hand,
        "least_over_by_hand_no_output_held": least_brief / by_hand_brief,
        "plan_bytes": peak,
        "measured_over_predicted": peak / predicted,
        "time_over_by_hand": median(ratios),
        "time_spread": [ratios[0], ratios[-1]],
        "unlimited_time_over_plain": median(of_free),
        "unlimited_time_spread": [of_free[0], of_free[-1]],
        "predicted_time_over_large": plan.predicted.step_seconds / plan.baselines["large"].step_seconds,
    }


def _step(given: Given) -> None:
    out = given.model(*given.args, **given.kwargs)  # held to the end: plans reckon with that
    given.loss(out).backward()


def _timed(given: Given, plans: dict[str, FitPlan], rounds: int) -> dict[str, list[float]]:
    """Seconds of steps of the plain model, by hand and under plans; each has a model of its own."""
    runs: dict[str, Callable[[], None]] = {}
    with ExitStack() as applied:
        for name in ("plain", "by hand", *plans):
            own = deepcopy(given)
            if name == "by hand":
                applied.enter_context(checkpointed(own.blocks))
            elif name in plans:
                evoplan.fit(own.model, own.args, own.kwargs, loss=own.loss, plan=plans[name])
            runs[name] = partial(_step, own)
        return interleaved(runs, rounds)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@json_option
def command(names: tuple[str, ...], rounds: int, json_path: str | None) -> None:
    """Print a line per model."""
    check_writable(json_path=json_path)
    found = {}
    for name in names or MODELS:
        torch.manual_seed(0)
        found[name] = row = compare(MODELS[name](), rounds)
        low, high = row["time_spread"]
        print(
            f"{name:11} by hand {row['by_hand_bytes'] / 2**20:7.1f} MiB; least "
            f"{row['least_over_by_hand']:.2f} of it ({row['least_over_by_hand_no_output_held']:.2f} where no "
            f"output is held); at its peak {row['time_over_by_hand']:.3f} of its time "
            f"({low:.3f} to {high:.3f}; predicted {row['predicted_time_over_large']:.3f}), peak measured "
            f"over predicted {row['measured_over_predicted']:.4f}; without a budget "
            f"{row['unlimited_time_over_plain']:.3f} of the plain model's time",
            flush=True,
        )
    if json_path:
        write_json(json_path, found)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.fits")
