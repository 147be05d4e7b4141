"""What TinyOpenFold is trained on: made batch by batch from a seed and a number, none of it stored.

Tasks: `random`, the original's noise, from which nothing can be learned (the loss of always answering 10
Angstrom is 400 / 12 = 33.3); and `distance`, where the alignment encodes a smooth chain of residues in space,
whose distances are asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.families.tiny_openfold import Task
from evoplan.model.modules.tiny_openfold import LARGEST_DISTANCE

STEP = 3.8  # Angstrom between neighbours along the chain, as between alpha carbons
STIFFNESS = 0.85  # correlation of neighbouring steps' directions
NOISE = 0.05  # chance that a residue is another one in one sequence
SIZE = 7.0  # Angstrom: root mean square distance of a chain's residues from their centre


def tiny_batch(
    config: TinyOpenFoldConfig, shape: InputShape, task: Task, seed: int, number: int
) -> dict[str, Tensor]:
    """The arguments of `TinyOpenFold.forward` by name, on the CPU; equal for equal seeds and numbers.

    Returns:
        tokens int64 [b, s, r], pair_features float32 [b, r, r, c_pair_features], distances float32
        [b, r, r, 1] in Angstrom, from 0 to 20.
    """
    # A batch's own seed by a fixed multiplier: consecutive batches start far from each other.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    make = {"random": _noise, "distance": _chains}[task]
    tokens, features, distances = make(config, shape, generator)
    return {"tokens": tokens, "pair_features": features, "distances": distances}


def _noise(
    config: TinyOpenFoldConfig, shape: InputShape, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    b, s, r = shape.batch, shape.rows(), shape.n_res
    tokens = torch.randint(config.n_token, (b, s, r), generator=generator)
    features = torch.randn(b, r, r, config.c_pair_features, generator=generator)
    return tokens, features, torch.rand(b, r, r, 1, generator=generator) * LARGEST_DISTANCE


def _chains(
    config: TinyOpenFoldConfig, shape: InputShape, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Row k of the alignment says where each residue lies along direction k, in as many bins as tokens.

    The directions are part of the task: the same for every batch and seed.

    The features of a pair are its clipped offset along the chain, one-hot (Suppl. Alg. 4 of AlphaFold 2).
    """
    b, s, r = shape.batch, shape.rows(), shape.n_res
    places = _smooth_walk(b, r, generator)
    directions = F.normalize(torch.randn(s, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    along = places @ directions.T  # [b, r, s]
    bins = ((along / LARGEST_DISTANCE + 0.5) * config.n_token).long().clamp(0, config.n_token - 1)
    tokens = bins.transpose(-1, -2).contiguous()
    other = torch.randint(config.n_token, (b, s, r), generator=generator)
    tokens = torch.where(torch.rand(b, s, r, generator=generator) < NOISE, other, tokens)
    most = (config.c_pair_features - 1) // 2
    position = torch.arange(r)
    offset = (position[:, None] - position).clamp(-most, most) + most
    features = F.one_hot(offset, config.c_pair_features).float().expand(b, r, r, -1)
    distances = torch.cdist(places, places).clamp(max=LARGEST_DISTANCE)
    return tokens, features.contiguous(), distances.unsqueeze(-1)


def _smooth_walk(b: int, r: int, generator: torch.Generator) -> Tensor:
    """[b, r, 3] places in Angstrom around the origin: steps of one length whose directions change slowly."""
    fresh = torch.randn(b, r, 3, generator=generator)
    step, steps = fresh[:, 0], []
    for k in range(r):
        step = F.normalize(STIFFNESS * step + (1 - STIFFNESS**2) ** 0.5 * fresh[:, k], dim=-1)
        steps.append(step)
    places = STEP * torch.stack(steps, dim=1).cumsum(dim=1)
    places = places - places.mean(dim=1, keepdim=True)
    # A long chain would leave the range of the answers: every chain is scaled to one size.
    size = places.pow(2).sum(-1).mean(-1).sqrt()[:, None, None]
    return places * (SIZE / size.clamp_min(1e-6))  # a single residue has none
