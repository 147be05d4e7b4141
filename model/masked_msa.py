"""A small trainable program around an Evoformer stack: embedding, masked-MSA head, and the loss.

Source: Jumper et al. (2021), Suppl. Alg. 3 and 4 (embedding), 1.2.7 (masking), 1.9.9 (head and loss).
Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.alignment import AMINO_ACIDS, GAP, MASK, N_TOKENS, Alignment
from model.config import EvoformerConfig, InputShape

Batch = dict[str, Tensor]
Stack = Callable[..., tuple[Tensor, Tensor]]
# For some tensors of the state, by name: rows and columns (the last dimensions but the channels).
Part = Mapping[str, tuple[slice, slice]]

WHOLE = slice(None), slice(None)

N_AMINO_ACIDS = len(AMINO_ACIDS)
MAX_OFFSET = 32  # sequence distance from which all pairs count as equally far (Suppl. Alg. 4)
MASKED_SHARE = 0.15
# What a chosen position turns into (Suppl. 1.2.7); the mask token takes the remaining 70 %.
RANDOM_SHARE, PROFILE_SHARE, UNCHANGED_SHARE = 0.1, 0.1, 0.1


class MaskedMSAModel(nn.Module):
    """Embeds an alignment, runs `stack` over it and predicts the tokens that were masked.

    `stack` is called as stack(m, z, msa_mask, pair_mask) -> (m, z). m and z have the dtype of this module's
    parameters, so `model.to(torch.bfloat16)` selects it; batches stay as `mask_msa` made them, and have to be
    on the parameters' device. AlphaFold 2's extra MSA, templates and recycling are left out.
    """

    def __init__(self, config: EvoformerConfig, stack: Stack) -> None:
        super().__init__()
        # A linear layer on a one-hot vector picks a row of its weight, which is what an embedding does.
        self.msa_embedding = nn.Embedding(N_TOKENS, config.c_m)
        self.deletion_embedding = nn.Linear(2, config.c_m)
        self.query_embedding = nn.Embedding(N_TOKENS, config.c_m)
        self.left_embedding = nn.Embedding(N_TOKENS, config.c_z)
        self.right_embedding = nn.Embedding(N_TOKENS, config.c_z)
        self.offset_embedding = nn.Embedding(2 * MAX_OFFSET + 1, config.c_z)
        self.stack = stack
        self.head_linear = nn.Linear(config.c_m, N_TOKENS)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Variance 1 / (inputs of the linear layer) and zero biases (Suppl. 1.11.4); the stack is left alone.

        The head starts like the rest, not at zero, so that gradients reach the stack in the first step.
        """
        for embedding, inputs in (
            (self.msa_embedding, N_TOKENS + 2),  # one layer with the deletion features
            (self.deletion_embedding, N_TOKENS + 2),
            (self.query_embedding, N_TOKENS),
            (self.left_embedding, N_TOKENS),
            (self.right_embedding, N_TOKENS),
            (self.offset_embedding, 2 * MAX_OFFSET + 1),
            (self.head_linear, self.head_linear.in_features),
        ):
            nn.init.normal_(embedding.weight, std=inputs**-0.5)
            if isinstance(embedding, nn.Linear):
                nn.init.zeros_(embedding.bias)

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, Tensor]:
        """m [b, s, r, c_m] and z [b, r, r, c_z] for the stack (Suppl. Alg. 3 and 4).

        The query enters unmasked through its own embedding, as AlphaFold 2's target features do.

        Args:
            batch: whole, also where only a part is embedded.
            own: for "m" and "z" the rows and columns to embed, and no others; all where not named.
        """
        own = own or {}
        query = batch["targets"][..., 0, :]  # [b, r]
        rows, columns = own.get("m", WHOLE)
        # Sums are taken in place: no layer keeps its output for the backward pass.
        m = self.msa_embedding(batch["tokens_in"][..., rows, columns])
        m += self.deletion_embedding(_deletion_features(batch["deletions"][..., rows, columns], m.dtype))
        m += self.query_embedding(query[..., columns]).unsqueeze(-3)
        rows, columns = own.get("z", WHOLE)
        left, right = self.left_embedding(query[..., rows]), self.right_embedding(query[..., columns])
        z = left.unsqueeze(-2) + right.unsqueeze(-3)
        position = torch.arange(query.shape[-1], device=query.device)
        z += self.offset_embedding(_clipped_offsets(position[rows], position[columns]))
        return m, z

    def head(self, m: Tensor) -> Tensor:
        """Logits of the tokens, [*, s, r, 23], from m [*, s, r, c_m] (Suppl. 1.9.9)."""
        return self.head_linear(m)

    def loss(self, m: Tensor, z: Tensor, batch: Batch, own: Part | None = None) -> Tensor:
        """Cross entropy averaged over the masked positions; a scalar, 0 where none is masked (Suppl. 1.9.9).

        It depends on m alone: z's own losses (AlphaFold 2's distogram head and structure module) are not
        here. So nothing that only changes the last z is trained: in the last block, the outer product mean,
        the triangle submodules and the pair transition get no gradient. The blocks before reach the loss
        through the pair bias of the next block's row attention.

        Args:
            m, z: the stack's outputs, or the part of them that `own` names.
            batch: whole.
            own: as in `embed`. The losses of parts that make up the whole add up to the whole's.
        """
        rows, columns = (own or {}).get("m", WHOLE)
        logits = self.head(m).flatten(0, -2)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()  # a log-softmax of 23 classes needs more than 8 or 11 bits
        is_masked = batch["is_masked"][..., rows, columns].flatten()
        targets = batch["targets"][..., rows, columns].flatten()
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * is_masked).sum() / batch["is_masked"].sum().clamp(min=1)

    def forward(
        self,
        batch: Batch,
        own: Part | None = None,
        own_outputs: Part | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """The loss of one batch of `mask_msa`; a scalar.

        Args:
            own: the part of the state that the stack takes, as in `embed`; its masks are whole all the same.
            own_outputs: the part of m and z that it returns.
            dropout_seed: for the stack, which draws one when None.
        """
        m, z = self.embed(batch, own)
        m, z = self.stack(m, z, batch["msa_mask"], batch["pair_mask"], dropout_seed=dropout_seed)
        return self.loss(m, z, batch, own_outputs)


def _deletion_features(deletions: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether there is a deletion, and 2/pi arctan(count / 3): [..., 2] (Suppl. Table 1)."""
    counts = deletions.float()
    return torch.stack((counts.clamp(max=1.0), torch.atan(counts / 3.0) * (2.0 / math.pi)), dim=-1).to(dtype)


def _clipped_offsets(left: Tensor, right: Tensor) -> Tensor:
    """Index of the class of the sequence offset i - j, [rows, columns] (Suppl. Alg. 4)."""
    return (left[:, None] - right[None, :]).clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET


def mask_msa(tokens: np.ndarray | Tensor, deletions: np.ndarray | Tensor, seed: int) -> Batch:
    """Hide 15 % of an alignment's positions; the same seed hides the same ones on every machine.

    Each position is chosen by itself with that chance. Of the chosen, 10 % turn into a uniformly drawn amino
    acid, 10 % into a draw from their column, 10 % stay, and 70 % turn into the mask (Suppl. 1.2.7).

    tokens, deletions: [s, r], as in `Alignment`. Returns CPU tensors with a leading batch dimension of 1:
    tokens_in and targets int64 [1, s, r], is_masked bool [1, s, r] (the chosen, including those that stay),
    deletions int32 [1, s, r], msa_mask [1, s, r] and pair_mask [1, r, r] float32, all ones: an alignment has
    no padding. Raises ValueError when shapes differ or a token is no residue or gap.
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
    return {name: tensor.unsqueeze(0) for name, tensor in batch.items()}


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
