"""Programs around AlphaFold 3's stacks: they hide residues and predict them.

AlphaFold 3 trains these stacks through its diffusion and distogram losses, which are not here: predicting
what is hidden stands in for what follows.

Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.data.alignment import N_TOKENS, Alignment
from evoplan.model.data.batch import Batch, deletion_features, mask_msa
from evoplan.model.families import MSAModuleConfig, PairformerConfig
from evoplan.model.programs.program import Part, Program, Stack, chosen_rows, cross_entropy, part_of


class MaskedResidueModel(Program):
    """Embeds the query, 15 % of it hidden, runs a Pairformer, and predicts what is hidden from s."""

    loss_name = "masked-residue loss"

    def __init__(self, config: PairformerConfig, stack: Stack) -> None:
        super().__init__(config, stack)
        self.single_embedding = nn.Embedding(N_TOKENS, config.c_s)
        self.head_linear = nn.Linear(config.c_s, N_TOKENS)
        self.initialise({"single_embedding": N_TOKENS, "head_linear": config.c_s})

    @classmethod
    def draw(cls, config: ModelConfig, shape: InputShape, alignment: Alignment, seed: int) -> Batch:
        """The query alone: int64 tokens_in and targets, and which are hidden, [1, 1, r]; float32 masks."""
        batch = mask_msa(*chosen_rows(alignment, np.array([0])), seed, clusters=False)
        batch["single_mask"] = batch.pop("msa_mask").squeeze(-2)
        return batch

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, ...]:
        """s [b, r, c_s] and z [b, r, r, c_z], both of the query as it is hidden."""
        query = batch["tokens_in"][..., 0, :]  # [b, r]
        (residues,) = part_of("s", own, dims=1)
        return self.single_embedding(query[..., residues]), self.embed_z(query, *part_of("z", own))

    def loss(self, results: tuple[Tensor, ...], batch: Batch, own: Part | None = None) -> Tensor:
        """Cross entropy averaged over the hidden residues; a scalar, 0 where none is hidden.

        It depends on s alone, which reads z in every block.
        """
        (s, _), (residues,) = results, part_of("s", own, dims=1)
        is_masked = batch["is_masked"][..., 0, residues].flatten()
        each = cross_entropy(self.head_linear(s), batch["targets"][..., 0, residues])
        return (each * is_masked).sum() / batch["is_masked"].sum().clamp(min=1)


class MSAModuleModel(Program):
    """Embeds an alignment, 15 % of it hidden, runs an MSA module, and predicts the query's residues from z.

    Rows are neither clustered nor profiled, as in AlphaFold 3 (Abramson et al. (2024), Suppl. Alg. 8).
    """

    loss_name = "masked-residue loss"

    def __init__(self, config: MSAModuleConfig, stack: Stack) -> None:
        super().__init__(config, stack)
        self.msa_embedding = nn.Embedding(N_TOKENS, config.c_m)
        self.deletion_embedding = nn.Linear(2, config.c_m)
        self.head_linear = nn.Linear(config.c_z, N_TOKENS)
        row_features = N_TOKENS + 2
        self.initialise(
            {
                "msa_embedding": row_features,
                "deletion_embedding": row_features,
                "head_linear": config.c_z,
            }
        )

    @classmethod
    def draw(cls, config: ModelConfig, shape: InputShape, alignment: Alignment, seed: int) -> Batch:
        """The query and a random choice of the other rows, 15 % hidden: as `mask_msa` without clusters."""
        others = np.random.default_rng(seed).permutation(np.arange(1, alignment.n_seq))
        chosen = chosen_rows(alignment, np.append(0, others[: shape.rows() - 1]))
        return mask_msa(*chosen, seed, clusters=False)

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, ...]:
        """m [b, s, r, c_m] and z [b, r, r, c_z], both as the alignment is hidden."""
        rows, columns = part_of("m", own)
        m = self.msa_embedding(batch["tokens_in"][..., rows, columns])
        m += self.deletion_embedding(deletion_features(batch["deletions"][..., rows, columns], m.dtype))
        return m, self.embed_z(batch["tokens_in"][..., 0, :], *part_of("z", own))

    def loss(self, results: tuple[Tensor, ...], batch: Batch, own: Part | None = None) -> Tensor:
        """Cross entropy of residue i of the query from each z_ij, averaged; a scalar.

        Over those i that are hidden and all j; 0 where none is hidden.
        """
        z, (rows, _) = results[-1], part_of("z", own)
        hidden, residues = (batch[name][..., 0, rows] for name in ("is_masked", "targets"))
        shape = z.shape[:-1]
        each = cross_entropy(self.head_linear(z), residues[..., None].expand(shape))
        total = (each * hidden[..., None].expand(shape).flatten()).sum()
        query = batch["is_masked"][..., 0, :]
        return total / (query.sum().clamp(min=1) * query.shape[-1])
