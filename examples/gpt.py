"""A GPT in plain torch, its attention written inline."""

import torch
from torch import nn

import evoplan


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        up, down, self.heads = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), heads
        self.mlp = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down, nn.Dropout(0.1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        later = x.new_ones(x.shape[1], x.shape[1]).triu(1) > 0
        logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def build():
    """The model, what it is called with, and its loss."""
    tokens = torch.randint(99, (4, 65), generator=torch.manual_seed(0))
    model = nn.Sequential(nn.Embedding(99, 64), *(Block(64, 4) for _ in range(6)), nn.Linear(64, 99))
    return model, (tokens,), {}, lambda out: nn.functional.cross_entropy(out.mT, tokens)


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="8MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
