"""An nn.Sequential of transformer blocks."""

import torch
from torch import nn

import evoplan


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    blocks = (nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True) for _ in range(6))
    model = nn.Sequential(nn.Linear(16, 64), *blocks, nn.Linear(64, 7))
    return model.train(), (torch.randn(4, 30, 16),), {}, lambda out: out.square().mean()


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="5MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
