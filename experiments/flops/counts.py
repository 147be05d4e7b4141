"""Arithmetic and traffic of one training step by component, from counters that know nothing of each other.

- `analytic`: the closed formulas of `cost_model.flops`.
- `counted`: torch's FlopCounterMode, component after component, and `counted_step`, the whole step at once.
- `by_deepspeed`: DeepSpeed's profiler where it is installed. It counts the forward pass, and besides matrix
  products what it estimates of the elementwise operators that it knows.

All count one step: nothing adds up over steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.flops import Flops, tiny_openfold_flops
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.trace import Work
from evoplan.experiments.tiny_openfold.memory import empty_batch
from evoplan.experiments.tiny_openfold.training import Recipe, run_step
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.modules.tiny_openfold import LARGEST_DISTANCE, TinyOpenFold
from evoplan.model.running.chain import Chain
from evoplan.model.running.execution import record
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.problems.costing import kind_of

# The components that people ask for, and the parts that each is made of.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "msa_attention": ("row_attention", "column_attention"),
    "msa_transition": ("msa_transition",),
    "outer_product_mean": ("outer_product_mean",),
    "triangle_multiplication": ("triangle_outgoing", "triangle_incoming"),
    "triangle_attention": ("triangle_starting", "triangle_ending"),
    "pair_transition": ("pair_transition",),
    "embeddings": ("embedding",),
    "output_head": ("distance_head",),
}
_COMPONENT = {part: name for name, parts in COMPONENTS.items() for part in parts}


def analytic(config: TinyOpenFoldConfig, shape: InputShape) -> dict[str, Flops]:
    """FLOPs of each component by formula."""
    found = tiny_openfold_flops(config, shape)
    return {
        name: Flops(sum(found[part].forward for part in parts), sum(found[part].backward for part in parts))
        for name, parts in COMPONENTS.items()
    }


def counted(recipe: Recipe) -> tuple[dict[str, Flops], dict[str, Work]]:
    """FLOPs of each component by FlopCounterMode, and its kernels and their traffic; nothing is computed."""
    forward, backward = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
    works = {name: Work() for name in COMPONENTS}

    @contextmanager
    def into(name: str, flops: dict[str, int]) -> Iterator[None]:
        trace.reset()
        with FlopCounterMode(display=False) as counter:
            yield
        flops[name] += counter.get_total_flops()
        works[name] += trace.work()

    with simulated() as trace:
        model = _fake_model(recipe.config)
        batch = empty_batch(recipe, recipe.shape.batch)
        with into("embeddings", forward):
            state = {"m": model.msa_embedding(batch["tokens"])}
            state["z"] = model.pair_embedding(batch["pair_features"])
        with into("embeddings", backward):
            weights = model.msa_embedding.weight, model.pair_embedding.weight
            torch.autograd.grad(tuple(state.values()), weights, tuple(map(torch.empty_like, state.values())))
        state = {name: tensor.detach() for name, tensor in state.items()}
        for step in Chain.of(model.stack).steps:  # type: ignore[arg-type]
            name = _COMPONENT[kind_of(step.name)]
            with into(name, forward):
                run, target = record(step.submodule, WHOLE, step.tensors(state, {}, None))
            with into(name, backward):
                run.vjp(torch.empty_like(target))
            state[step.target] = target
        z = state["z"].detach().requires_grad_()
        with into("output_head", forward):
            predicted = model.distance_head(z).sigmoid() * LARGEST_DISTANCE
            loss = nn.functional.mse_loss(predicted, batch["distances"])
        with into("output_head", backward):
            loss.backward()
    return {name: Flops(forward[name], backward[name]) for name in COMPONENTS}, works


def counted_step(recipe: Recipe) -> int:
    """FLOPs of a whole training step by FlopCounterMode."""
    with fake_tensors():
        model, batch = _fake_model(recipe.config), empty_batch(recipe, recipe.shape.batch)
        with FlopCounterMode(display=False) as counter:
            run_step(model, batch, None, None, None, "cpu")
        total: int = counter.get_total_flops()
        return total


class DeepSpeedCount(NamedTuple):
    """FLOPs of a forward pass.

    Attributes:
        products: two for each multiply-add of a matrix product: what the others count.
        elementwise: its estimates of normalisations (5 an element), softmax, activations, gates and sums (1).
    """

    products: int
    elementwise: int


def by_deepspeed(recipe: Recipe) -> DeepSpeedCount | None:
    """FLOPs of the forward pass by DeepSpeed's profiler; None where it is not installed."""
    if find_spec("deepspeed") is None:
        return None
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    model = TinyOpenFold(recipe.config)
    batch = empty_batch(recipe, recipe.shape.batch)
    batch["tokens"].zero_()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():
        model(batch["tokens"], batch["pair_features"])
    products = 2 * int(profiler.get_total_macs())
    found = DeepSpeedCount(products, int(profiler.get_total_flops()) - products)
    profiler.end_profile()
    return found


def _fake_model(config: TinyOpenFoldConfig) -> TinyOpenFold:
    with torch.device("meta"):
        plain = TinyOpenFold(config)
    model = fake_copy(plain, torch.float32).train()
    assert isinstance(model, TinyOpenFold)
    return model
