"""What a training step is fed with: an alignment, some of it hidden, as tensors.

Source: Jumper et al. (2021), Suppl. 1.2.7 (clusters and masking) and Table 1 (features).
Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from evoplan.model.config import InputShape
from evoplan.model.data.alignment import AMINO_ACIDS, GAP, MASK, Alignment
from evoplan.model.data.clusters import summarise

Batch = dict[str, Tensor]
Rows = tuple[np.ndarray, np.ndarray]  # tokens and deletions, as in `Alignment`

N_AMINO_ACIDS = len(AMINO_ACIDS)
MASKED_SHARE = 0.15
# What a chosen position turns into (Suppl. 1.2.7); the mask token takes the remaining 70 %.
RANDOM_SHARE, PROFILE_SHARE, UNCHANGED_SHARE = 0.1, 0.1, 0.1


def mask_msa(
    tokens: np.ndarray | Tensor,
    deletions: np.ndarray | Tensor,
    seed: int,
    others: Rows | None = None,
    clusters: bool = True,
) -> Batch:
    """Hide 15 % of an alignment's positions; the same seed hides the same ones on every machine.

    Each position is chosen by itself with that chance. Of the chosen, 10 % turn into a uniformly drawn amino
    acid, 10 % into a draw from their column, 10 % stay, and 70 % turn into the mask (Suppl. 1.2.7). The
    column is that of the rows given; the paper draws from the profile of the whole alignment.

    Args:
        tokens, deletions: [s, r], as in `Alignment`; the rows are the centres of clusters.
        others: tokens and deletions [n, r] of the rows that belong to the clusters besides their centres.
        clusters: give the clusters' features too.

    Returns CPU tensors with a leading batch dimension of 1: tokens_in and targets int64 [1, s, r], is_masked
    bool [1, s, r] (the chosen, including those that stay), deletions int32 [1, s, r], msa_mask [1, s, r] and
    pair_mask [1, r, r] float32, all ones: an alignment has no padding. With clusters, profile float32
    [1, s, r, 24]: how often each token occurs in the cluster, its centre masked, and 2/pi arctan(d / 3) of
    its mean number d of deletions (Suppl. Table 1).

    Raises ValueError when shapes differ or a token is no residue or gap.
    """
    targets = torch.as_tensor(tokens).long()
    counts = torch.as_tensor(deletions).int()
    if targets.ndim != 2 or targets.numel() == 0 or targets.shape != counts.shape:
        raise ValueError(
            "tokens and deletions must both be [n_seq, n_res] with at least one position, "
            f"not {tuple(targets.shape)} and {tuple(counts.shape)}"
        )
    if targets.min() < 0 or targets.max() > GAP:
        raise ValueError(f"tokens must be from 0 to {GAP}: residues and gaps, not yet masked")
    n_seq, n_res = targets.shape
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(n_seq, n_res, generator=generator) < MASKED_SHARE
    fate = torch.rand(n_seq, n_res, generator=generator)
    uniform = torch.randint(N_AMINO_ACIDS, (n_seq, n_res), generator=generator)
    # The same column of a random row is a draw from the column's profile, gaps included.
    profile = targets.gather(0, torch.randint(n_seq, (n_seq, n_res), generator=generator))

    replaced = torch.full_like(targets, MASK)
    replaced = torch.where(fate < RANDOM_SHARE + PROFILE_SHARE + UNCHANGED_SHARE, targets, replaced)
    replaced = torch.where(fate < RANDOM_SHARE + PROFILE_SHARE, profile, replaced)
    replaced = torch.where(fate < RANDOM_SHARE, uniform, replaced)
    batch = {
        "tokens_in": torch.where(is_masked, replaced, targets),
        "targets": targets,
        "is_masked": is_masked,
        "deletions": counts,
        "msa_mask": torch.ones(n_seq, n_res),
        "pair_mask": torch.ones(n_res, n_res),
    }
    if clusters:
        none = np.empty((0, n_res), dtype=np.int32)
        batch["profile"] = _profile(batch, *(others or (none, none)))
    return {name: tensor.unsqueeze(0) for name, tensor in batch.items()}


def _profile(batch: Batch, tokens: np.ndarray, deletions: np.ndarray) -> Tensor:
    found = summarise(batch["tokens_in"].numpy(), batch["deletions"].numpy(), tokens, deletions)
    profile, mean = map(torch.from_numpy, found)
    return torch.cat((profile, scaled_deletions(mean).unsqueeze(-1)), dim=-1)


def scaled_deletions(counts: Tensor) -> Tensor:
    """2/pi arctan(count / 3) of float counts (Suppl. Table 1)."""
    return torch.atan(counts / 3.0) * (2.0 / math.pi)


def deletion_features(deletions: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether there is a deletion, and 2/pi arctan(count / 3): [..., 2] (Suppl. Table 1)."""
    counts = deletions.float()
    return torch.stack((counts.clamp(max=1.0), scaled_deletions(counts)), dim=-1).to(dtype)


def extra_rows(tokens: np.ndarray, deletions: np.ndarray) -> Batch:
    """What a trunk's extra stack is fed with: rows [s_e, r] that are neither masked nor clustered.

    Returns CPU tensors with a leading batch dimension of 1: extra_tokens int64, extra_deletions int32 and
    extra_mask float32, all ones, [1, s_e, r] (Suppl. Table 1, extra_msa).
    """
    return {
        "extra_tokens": torch.from_numpy(tokens).long().unsqueeze(0),
        "extra_deletions": torch.from_numpy(deletions).int().unsqueeze(0),
        "extra_mask": torch.ones(1, *tokens.shape),
    }


def random_alignment(n_seq: int, n_res: int, seed: int) -> Alignment:
    """A random query and mutated copies of it, each with its own divergence of 10 to 60 %.

    Copies have gaps at 5 % of the positions and deletions of 1 to 3 residues before 2 %.
    For runs without a file; raises ValueError when a size is below 1.
    """
    InputShape(n_seq, n_res)
    generator = torch.Generator().manual_seed(seed)

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    query = torch.randint(N_AMINO_ACIDS, (n_res,), generator=generator)
    divergence = 0.1 + 0.5 * chance(n_seq, 1)
    other = torch.randint(N_AMINO_ACIDS, (n_seq, n_res), generator=generator)
    tokens = torch.where(chance(n_seq, n_res) < divergence, other, query)
    tokens[chance(n_seq, n_res) < 0.05] = GAP
    deletions = torch.randint(1, 4, (n_seq, n_res), generator=generator)
    deletions[chance(n_seq, n_res) >= 0.02] = 0
    tokens[0], deletions[0] = query, 0
    names = ("query", *(f"copy {index}" for index in range(1, n_seq)))
    return Alignment(names, tokens.numpy().astype(np.uint8), deletions.numpy().astype(np.int32))
