"""A GPT in plain torch, its attention written inline."""

import torch
from torch import nn
from torch.nn import functional as F

import evoplan


class Block(nn.Module):
    """Attention and a transition."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.out(
            (logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(x)


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(99, 64), *(Block(64, 4) for _ in range(6)), nn.Linear(64, 99))
    tokens = torch.randint(99, (4, 65))
    return model, (tokens,), {}, lambda out: F.cross_entropy(out.flatten(0, 1), tokens.flatten())


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="8MiB", loss=loss)
    print(fitted.report())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(fitted(*args, **kwargs))
        value.backward()
        optimizer.step()
        print(f"loss {value.item():.4f}")
    print(fitted.verify(args, kwargs))
