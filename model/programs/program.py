"""What is trained around a stack: an embedding of alignments, heads and a loss.

Legend: b = 1 alignment, s = n_seq, r = n_res.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.data.alignment import N_TOKENS, Alignment
from evoplan.model.data.batch import Batch

Stack = Callable[..., tuple[Tensor, ...]]
# For some tensors of the state, by name: a slice of each dimension but batch and channels.
Part = Mapping[str, tuple[slice, ...]]
Rows = tuple[np.ndarray, np.ndarray]  # tokens and deletions, as in `Alignment`

MAX_OFFSET = 32  # sequence distance from which all pairs count as equally far (Suppl. Alg. 4)


class Program(nn.Module):
    """Base of the programs. `stack` is called as stack(*state, *masks, dropout_seed=seed).

    State and masks are in the order of the configuration's. The state has the dtype of this module's
    parameters, so `model.to(torch.bfloat16)` selects it; batches stay as they were made, and have to be on
    the parameters' device. z is embedded here: from the query, and how far apart residues are.

    Source: Jumper et al. (2021), Suppl. Alg. 3 and 4.
    """

    loss_name: str

    def __init__(self, config: ModelConfig, stack: Stack) -> None:
        super().__init__()
        c_z = config.width("z")
        self.masks = tuple(config.masks)
        # A linear layer on a one-hot vector picks a row of its weight, which is what an embedding does.
        self.left_embedding = nn.Embedding(N_TOKENS, c_z)
        self.right_embedding = nn.Embedding(N_TOKENS, c_z)
        self.offset_embedding = nn.Embedding(2 * MAX_OFFSET + 1, c_z)
        self.stack = stack

    @classmethod
    def draw(cls, config: ModelConfig, shape: InputShape, alignment: Alignment, seed: int) -> Batch:
        """One step's batch of rows of an alignment, on the CPU; the same seed makes the same one."""
        raise NotImplementedError

    def embed(self, batch: Batch, own: Part | None = None) -> tuple[Tensor, ...]:
        """The state that the stack starts from, in the order of the configuration's.

        Args:
            batch: whole, also where only a part is embedded.
            own: of some tensors the part to embed, and no other; all where not named.
        """
        raise NotImplementedError

    def loss(self, results: tuple[Tensor, ...], batch: Batch, own: Part | None = None) -> Tensor:
        """A scalar of the stack's results.

        Args:
            results: or the part of them that `own` names.
            batch: whole. The losses of parts that make up the whole add up to the whole's.
        """
        raise NotImplementedError

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
            own_outputs: the part of its results that it returns.
            dropout_seed: for the stack, which draws one when None.
        """
        state = self.embed(batch, own)
        # A plan counts masks of the state's dtype; the copies are the program's own.
        masks = (batch[name].to(state[0].dtype) for name in self.masks)
        results = self.stack(*state, *masks, dropout_seed=dropout_seed)
        del state
        return self.loss(results, batch, own_outputs)

    @torch.no_grad()
    def initialise(self, inputs: Mapping[str, int]) -> None:
        """Variance 1 / (inputs of the linear layer) and zero biases (Suppl. 1.11.4); the stack is left alone.

        The head starts like the rest, not at zero, so that gradients reach the stack in the first step.

        Args:
            inputs: of the layers besides those of z, by name.
        """
        of_z = {"left_embedding": N_TOKENS, "right_embedding": N_TOKENS}
        inputs = {**of_z, "offset_embedding": 2 * MAX_OFFSET + 1, **inputs}
        for name, layer in self.named_children():
            if name in inputs:
                assert isinstance(layer, nn.Linear | nn.Embedding)
                nn.init.normal_(layer.weight, std=inputs[name] ** -0.5)
                if isinstance(layer, nn.Linear) and layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def embed_z(self, query: Tensor, rows: slice, columns: slice) -> Tensor:
        """z [b, rows, columns, c_z] from the query's tokens [b, r]."""
        left: Tensor = self.left_embedding(query[..., rows])
        right: Tensor = self.right_embedding(query[..., columns])
        z = left.unsqueeze(-2) + right.unsqueeze(-3)
        position = torch.arange(query.shape[-1], device=query.device)
        z += self.offset_embedding(_clipped_offsets(position[rows], position[columns]))
        return z


def part_of(name: str, own: Part | None, dims: int = 2) -> tuple[slice, ...]:
    """The part of a tensor that is a rank's own: all of it where none is named."""
    return (own or {}).get(name, (slice(None),) * dims)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each position, in single precision at least; logits are [..., classes]."""
    logits = logits.flatten(0, -2)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # a log-softmax of 23 classes needs more than 8 or 11 bits
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


def chosen_rows(alignment: Alignment, chosen: np.ndarray) -> Rows:
    """Tokens and deletions of some rows, in their order."""
    chosen = np.sort(chosen)
    return alignment.tokens[chosen], alignment.deletions[chosen]


def _clipped_offsets(left: Tensor, right: Tensor) -> Tensor:
    """Index of the class of the sequence offset i - j, [rows, columns] (Suppl. Alg. 4)."""
    return (left[:, None] - right[None, :]).clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
