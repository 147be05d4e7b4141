"""Small models with non-zero weights everywhere, in float64, with random masks and odd sizes."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from evoplan.cost_model.costs import CostTable, build_cost_table
from evoplan.cost_model.devices import device
from evoplan.model import Chain, EvoformerConfig, EvoformerStack, InputShape
from evoplan.model.config import ModelConfig
from evoplan.model.families import MSAModuleConfig, PairformerConfig
from evoplan.model.running.kernels import KERNELS, Kernel
from evoplan.model.running.tiled import tiled_attention

# Nobody's own measured times come into a test.
os.environ["EVOPLAN_CACHE"] = os.path.join(tempfile.gettempdir(), "evoplan-tests-have-no-cache.sqlite")

# Nor into the user's traces what tests make, but all processes of a test run share theirs.
os.environ.setdefault("EVOPLAN_TRACES", str(Path(__file__).parents[1] / ".pytest_cache" / "evoplan"))

# xdist tells its workers the width of its own terminal, which is none of what tests print to.
os.environ.pop("COLUMNS", None)

# How many of its examples a property is tried on, in percent: a part in `make test`, all in `make slow`.
settings.register_profile("part", max_examples=25)
settings.register_profile("all", max_examples=100)
settings.load_profile("part")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; threads that wait for each other take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark properties, so that `make slow` finds them."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("property")


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_looked_through() -> None:
    """Measurements collect garbage first, which takes longest where there is none: in what was loaded."""
    gc.collect()
    gc.freeze()


def examples(count: int, **others: Any) -> settings:
    """Settings of a property that is worth so many examples; however long each takes."""
    share = settings.default.max_examples
    return settings(max_examples=max(20, count * share // 100), deadline=None, **others)


TINY = EvoformerConfig(
    n_block=2, c_m=12, c_z=10, n_head_msa=3, n_head_pair=2, c_head=4, c_head_msa=6, c_opm=5, c_tri=7
)

# Tiles of one query, of a few, of a few heads, and of a few rows; for no device, so that no plan has them.
TILES = {
    f"tiled({size}B)": Kernel(f"tiled({size}B)", partial(tiled_attention, tile_bytes=size), ())
    for size in (1, 200, 700, 3000)
}
KERNELS.update(TILES)

TINY_EXTRA = replace(TINY, column_attention="global")


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights: a final layer of zeros would hide every error behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale)
    return module


TINY_PAIRFORMER = PairformerConfig(
    n_block=2, c_s=9, c_z=10, n_head_single=3, c_head_single=5, n_head_pair=2, c_head=4, c_tri=7
)

TINY_MSA_MODULE = MSAModuleConfig(
    n_block=2, c_m=12, c_z=10, n_head_msa=3, c_head_msa=6, n_head_pair=2, c_head=4, c_opm=5, c_tri=7
)


def random_inputs(
    config: ModelConfig,
    s: int = 5,
    r: int = 7,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The state (leaves that require gradients) and masks of which about a fifth is zero."""
    g = torch.Generator().manual_seed(seed)
    reads_rows = any("seq" in dims for dims in config.state.values())
    whole = config.state_shapes(InputShape(s if reads_rows else None, r))
    shapes = {name: (*batch, *shape[1:]) for name, shape in whole.items()}
    state = {
        name: torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for name, shape in shapes.items()
    }
    masks = {
        mask: (torch.rand(shapes[of][:-1], generator=g) > 0.2).to(dtype) for mask, of in config.masks.items()
    }
    return state | masks


@pytest.fixture
def stack() -> EvoformerStack:
    return randomise(EvoformerStack(TINY).double()).train()


@pytest.fixture(scope="session")
def stack_table() -> CostTable:
    """Real costs of two blocks, from the trace."""
    with torch.device("meta"):
        model = EvoformerStack(EvoformerConfig(n_block=2, c_m=64, c_z=32)).train()
    shapes = model.config.state_shapes(InputShape(48, 64))
    return build_cost_table(model, shapes, "float16", device("a100-40gb"))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a file with an alignment."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "family.a3m"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def random_schedule_of(stack, seed: int, whole: bool = False):
    """Any schedule over a model's steps, checkpoints nested up to three deep; `whole`: none in pieces."""
    from tests.test_apply import random_schedule

    chain = Chain.of(stack)
    return random_schedule(chain, range(len(chain.steps)), random.Random(seed), 3, whole)
