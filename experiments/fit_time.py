"""How long it takes to fit 48 blocks of OpenFold-3's Pairformer at 384 tokens: with nothing kept, and again.

    python -m evoplan.experiments.fit_time [--rounds 3] [--json PATH]

Each is a process of its own, the model on the meta device; seconds are those of `evoplan.fit` alone, imports
of the model's own package left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import click
import torch

from evoplan.planner.commands.flags import json_option
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.files import check_writable, write_json

BLOCKS, TOKENS, BUDGET = 48, 384, "8GiB"
_CHILD = "from evoplan.experiments.fit_time import seconds_of_fit; print(seconds_of_fit())"


def seconds_of_fit() -> float:
    """Of one fit, in this process."""
    from openfold3.core.model.latent.pairformer import PairFormerStack

    import evoplan

    with torch.device("meta"):
        model = PairFormerStack(
            c_s=384, c_z=128, c_hidden_pair_bias=24, no_heads_pair_bias=16, c_hidden_mul=128,
            c_hidden_pair_att=32, no_heads_pair=4, no_blocks=BLOCKS, transition_type="swiglu",
            transition_n=4, pair_dropout=0.25, fuse_projection_weights=False, blocks_per_ckpt=None, inf=1e9,
        )  # fmt: skip
        masks = {"single_mask": torch.ones(1, TOKENS), "pair_mask": torch.ones(1, TOKENS, TOKENS)}
        args = torch.empty(1, TOKENS, 384), torch.empty(1, TOKENS, TOKENS, 128)
    begun = time.perf_counter()
    evoplan.fit(model.train(), args, masks, BUDGET, _squares, device="a100-40gb")
    return time.perf_counter() - begun


def _squares(out: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([tensor.square().mean() for tensor in out]).sum()


def _measured(folder: str) -> float:
    environment = os.environ | {"EVOPLAN_TRACES": folder}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD], env=environment, capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"a fit failed: {ran.stderr.strip().splitlines()[-1]}")
    return float(ran.stdout.split()[-1])


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@json_option
def command(rounds: int, json_path: str | None) -> None:
    """A line for each fit."""
    check_writable(json_path=json_path)
    found: dict[str, Any] = {"cold_seconds": [], "warm_seconds": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in found.items():
                times.append(_measured(folder))
                print(f"{name.removesuffix('_seconds')} {times[-1]:.2f} s", flush=True)
    if json_path:
        write_json(json_path, found)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.fit_time")
