"""The masked-MSA program around a stack or a trunk of AlphaFold 2's.

Source: Jumper et al. (2021), Suppl. Alg. 2, line 16, 3 and 4 (embedding), 1.9.9 (head and loss).
Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.data.alignment import N_TOKENS, Alignment
from evoplan.model.data.batch import Batch, deletion_features, extra_rows, mask_msa
from evoplan.model.families import EvoformerConfig, TrunkConfig
from evoplan.model.programs.program import Part, Program, Stack, chosen_rows, cross_entropy, part_of


class MaskedMSAModel(Program):
    """Embeds an alignment, runs `stack` over it and predicts the tokens that were masked.

    What is embedded depends on the model:

    - the main stack: m from cluster centres (Suppl. Alg. 3), z from the query (Alg. 4);
    - the extra stack alone: its m from rows without cluster features (Alg. 2, line 16), z as above. AlphaFold
      2 has no loss on it, as nobody reads its last m; here the masked-MSA loss stands in for what follows;
    - a trunk: e as the extra stack's m, from rows that are not masked, m and z as the main stack's.

    `stack` returns (m, z). Templates and recycling are left out.
    """

    loss_name = "masked-MSA loss"

    def __init__(self, config: EvoformerConfig | TrunkConfig, stack: Stack) -> None:
        super().__init__(config, stack)
        self.clusters = embeds_clusters(config)
        self.msa_embedding = nn.Embedding(N_TOKENS, config.c_m)
        self.deletion_embedding = nn.Linear(2, config.c_m)
        if self.clusters:
            self.profile_embedding = nn.Linear(N_TOKENS + 1, config.c_m, bias=False)
            self.query_embedding = nn.Embedding(N_TOKENS, config.c_m)
        if isinstance(config, TrunkConfig):
            self.extra_embedding = nn.Embedding(N_TOKENS, config.c_e)
            self.extra_deletion_embedding = nn.Linear(2, config.c_e)
        self.head_linear = nn.Linear(config.c_m, N_TOKENS)
        row_features = N_TOKENS + 2 + (N_TOKENS + 1) * self.clusters  # one layer, in parts
        self.initialise(
            {
                "msa_embedding": row_features,
                "deletion_embedding": row_features,
                "profile_embedding": row_features,
                "query_embedding": N_TOKENS,
                "extra_embedding": N_TOKENS + 2,
                "extra_deletion_embedding": N_TOKENS + 2,
                "head_linear": config.c_m,
            }
        )

    @classmethod
    def draw(cls, config: ModelConfig, shape: InputShape, alignment: Alignment, seed: int) -> Batch:
        """One step's batch, on the CPU; the same seed makes the same one.

        The main stack gets the query and a random choice of the others as cluster centres, whose features sum
        up all other rows; a trunk's extra stack a random choice of those that are no centres (Suppl. 1.2.7).
        The extra stack alone gets rows that are masked, without cluster features.
        """
        order = np.random.default_rng(seed).permutation(np.arange(1, alignment.n_seq))
        centres, others = np.split(order, [shape.rows() - 1])
        tokens, deletions = chosen_rows(alignment, np.append(0, centres))
        if not embeds_clusters(config):
            return mask_msa(tokens, deletions, seed, clusters=False)
        batch = mask_msa(tokens, deletions, seed, chosen_rows(alignment, others))
        if shape.n_extra is not None:
            batch |= extra_rows(*chosen_rows(alignment, others[: shape.n_extra]))
        return batch

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, ...]:
        """The state that the stack starts from: m [b, s, r, c_m] and z [b, r, r, c_z]; in a trunk, e first.

        The query enters m unmasked through its own embedding, as AlphaFold 2's target features do.

        Args:
            batch: whole, also where only a part is embedded.
            own: for "e", "m" and "z" the rows and columns to embed, and no others; all where not named.
        """
        query = batch["targets"][..., 0, :]  # [b, r]
        m = self._embed_m(batch, query, *part_of("m", own))
        z = self.embed_z(query, *part_of("z", own))
        if "extra_mask" not in self.masks:
            return m, z
        rows, columns = part_of("e", own)
        e = self.extra_embedding(batch["extra_tokens"][..., rows, columns])
        deletions = batch["extra_deletions"][..., rows, columns]
        e += self.extra_deletion_embedding(deletion_features(deletions, e.dtype))
        return e, m, z

    def _embed_m(self, batch: Batch, query: Tensor, rows: slice, columns: slice) -> Tensor:
        # Sums are taken in place: no layer keeps its output for the backward pass.
        m: Tensor = self.msa_embedding(batch["tokens_in"][..., rows, columns])
        m += self.deletion_embedding(deletion_features(batch["deletions"][..., rows, columns], m.dtype))
        if self.clusters:
            m += self.profile_embedding(batch["profile"][..., rows, columns, :].to(m.dtype))
            m += self.query_embedding(query[..., columns]).unsqueeze(-3)
        return m

    def head(self, m: Tensor) -> Tensor:
        """Logits of the tokens, [*, s, r, 23], from m [*, s, r, c_m] (Suppl. 1.9.9)."""
        logits: Tensor = self.head_linear(m)
        return logits

    def loss(self, results: tuple[Tensor, ...], batch: Batch, own: Part | None = None) -> Tensor:
        """Cross entropy averaged over the masked positions; a scalar, 0 where none is masked (Suppl. 1.9.9).

        It depends on m alone: z's own losses (AlphaFold 2's distogram head and structure module) are not
        here. So nothing that only changes the last z is trained: in the last block, the outer product mean,
        the triangle submodules and the pair transition get no gradient. The blocks before reach the loss
        through the pair bias of the next block's row attention.

        Args:
            results: m and z, or the part of them that `own` names.
            batch: whole.
            own: as in `embed`. The losses of parts that make up the whole add up to the whole's.
        """
        (m, _), (rows, columns) = results, part_of("m", own)
        is_masked = batch["is_masked"][..., rows, columns].flatten()
        each = cross_entropy(self.head(m), batch["targets"][..., rows, columns])
        return (each * is_masked).sum() / batch["is_masked"].sum().clamp(min=1)


def embeds_clusters(config: ModelConfig) -> bool:
    """Whether m's rows are cluster centres, with their clusters' features: not in the extra stack alone."""
    if isinstance(config, EvoformerConfig):
        return config.column_attention == "gated"
    return isinstance(config, TrunkConfig)
