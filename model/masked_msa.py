"""A small trainable program around a stack or a trunk: embedding, masked-MSA head, and the loss.

Source: Jumper et al. (2021), Suppl. Alg. 2, line 16, 3 and 4 (embedding), 1.9.9 (head and loss).
Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evoplan.model.alignment import N_TOKENS
from evoplan.model.batch import Batch, scaled_deletions
from evoplan.model.config import ModelConfig, TrunkConfig

Stack = Callable[..., tuple[Tensor, Tensor]]
# For some tensors of the state, by name: rows and columns (the last dimensions but the channels).
Part = Mapping[str, tuple[slice, slice]]

WHOLE = slice(None), slice(None)

MAX_OFFSET = 32  # sequence distance from which all pairs count as equally far (Suppl. Alg. 4)


class MaskedMSAModel(nn.Module):
    """Embeds an alignment, runs `stack` over it and predicts the tokens that were masked.

    What is embedded depends on the model:

    - the main stack: m from cluster centres (Suppl. Alg. 3), z from the query (Alg. 4);
    - the extra stack alone: its m from rows without cluster features (Alg. 2, line 16), z as above. AlphaFold
      2 has no loss on it, as nobody reads its last m; here the masked-MSA loss stands in for what follows;
    - a trunk: e as the extra stack's m, from rows that are not masked, m and z as the main stack's.

    `stack` is called as stack(*state, *masks, dropout_seed=seed), state and masks in the order of the
    configuration's, and returns (m, z). The state has the dtype of this module's parameters, so
    `model.to(torch.bfloat16)` selects it; batches stay as they were made, and have to be on the
    parameters' device. Templates and recycling are left out.
    """

    def __init__(self, config: ModelConfig, stack: Stack) -> None:
        super().__init__()
        trunk = isinstance(config, TrunkConfig)
        main = config.main if trunk else config
        self.masks = tuple(config.masks)
        self.clusters = embeds_clusters(config)
        # A linear layer on a one-hot vector picks a row of its weight, which is what an embedding does.
        self.msa_embedding = nn.Embedding(N_TOKENS, main.c_m)
        self.deletion_embedding = nn.Linear(2, main.c_m)
        if self.clusters:
            self.profile_embedding = nn.Linear(N_TOKENS + 1, main.c_m, bias=False)
            self.query_embedding = nn.Embedding(N_TOKENS, main.c_m)
        if trunk:
            self.extra_embedding = nn.Embedding(N_TOKENS, config.extra.c_m)
            self.extra_deletion_embedding = nn.Linear(2, config.extra.c_m)
        self.left_embedding = nn.Embedding(N_TOKENS, main.c_z)
        self.right_embedding = nn.Embedding(N_TOKENS, main.c_z)
        self.offset_embedding = nn.Embedding(2 * MAX_OFFSET + 1, main.c_z)
        self.stack = stack
        self.head_linear = nn.Linear(main.c_m, N_TOKENS)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Variance 1 / (inputs of the linear layer) and zero biases (Suppl. 1.11.4); the stack is left alone.

        The head starts like the rest, not at zero, so that gradients reach the stack in the first step.
        """
        row_features = N_TOKENS + 2 + (N_TOKENS + 1) * self.clusters  # one layer, in parts
        inputs = {
            "msa_embedding": row_features,
            "deletion_embedding": row_features,
            "profile_embedding": row_features,
            "query_embedding": N_TOKENS,
            "extra_embedding": N_TOKENS + 2,
            "extra_deletion_embedding": N_TOKENS + 2,
            "left_embedding": N_TOKENS,
            "right_embedding": N_TOKENS,
            "offset_embedding": 2 * MAX_OFFSET + 1,
            "head_linear": self.head_linear.in_features,
        }
        for name, embedding in self.named_children():
            if name in inputs:
                nn.init.normal_(embedding.weight, std=inputs[name] ** -0.5)
                if getattr(embedding, "bias", None) is not None:
                    nn.init.zeros_(embedding.bias)

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, ...]:
        """The state that the stack starts from: m [b, s, r, c_m] and z [b, r, r, c_z]; in a trunk, e first.

        The query enters m unmasked through its own embedding, as AlphaFold 2's target features do.

        Args:
            batch: whole, also where only a part is embedded.
            own: for "e", "m" and "z" the rows and columns to embed, and no others; all where not named.
        """
        own = own or {}
        query = batch["targets"][..., 0, :]  # [b, r]
        m = self._embed_m(batch, query, *own.get("m", WHOLE))
        z = self._embed_z(query, *own.get("z", WHOLE))
        if "extra_mask" not in self.masks:
            return m, z
        rows, columns = own.get("e", WHOLE)
        e = self.extra_embedding(batch["extra_tokens"][..., rows, columns])
        deletions = batch["extra_deletions"][..., rows, columns]
        e += self.extra_deletion_embedding(_deletion_features(deletions, e.dtype))
        return e, m, z

    def _embed_m(self, batch: Batch, query: Tensor, rows: slice, columns: slice) -> Tensor:
        # Sums are taken in place: no layer keeps its output for the backward pass.
        m = self.msa_embedding(batch["tokens_in"][..., rows, columns])
        m += self.deletion_embedding(_deletion_features(batch["deletions"][..., rows, columns], m.dtype))
        if self.clusters:
            m += self.profile_embedding(batch["profile"][..., rows, columns, :].to(m.dtype))
            m += self.query_embedding(query[..., columns]).unsqueeze(-3)
        return m

    def _embed_z(self, query: Tensor, rows: slice, columns: slice) -> Tensor:
        left, right = self.left_embedding(query[..., rows]), self.right_embedding(query[..., columns])
        z = left.unsqueeze(-2) + right.unsqueeze(-3)
        position = torch.arange(query.shape[-1], device=query.device)
        z += self.offset_embedding(_clipped_offsets(position[rows], position[columns]))
        return z

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
        """The loss of one batch; a scalar.

        Args:
            own: the part of the state that the stack takes, as in `embed`; its masks are whole all the same.
            own_outputs: the part of m and z that it returns.
            dropout_seed: for the stack, which draws one when None.
        """
        state = self.embed(batch, own)
        m, z = self.stack(*state, *(batch[name] for name in self.masks), dropout_seed=dropout_seed)
        return self.loss(m, z, batch, own_outputs)


def embeds_clusters(config: ModelConfig) -> bool:
    """Whether m's rows are cluster centres, with their clusters' features: not in the extra stack alone."""
    return isinstance(config, TrunkConfig) or config.column_attention == "gated"


def _deletion_features(deletions: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether there is a deletion, and 2/pi arctan(count / 3): [..., 2] (Suppl. Table 1)."""
    counts = deletions.float()
    return torch.stack((counts.clamp(max=1.0), scaled_deletions(counts)), dim=-1).to(dtype)


def _clipped_offsets(left: Tensor, right: Tensor) -> Tensor:
    """Index of the class of the sequence offset i - j, [rows, columns] (Suppl. Alg. 4)."""
    return (left[:, None] - right[None, :]).clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
