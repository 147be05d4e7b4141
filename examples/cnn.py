"""A residual CNN, whose normalisations count what they see."""

import torch
from torch import nn
from torch.nn import functional as F

import evoplan


class Residual(nn.Module):
    """Two convolutions."""

    def __init__(self, width):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(Residual(32) for _ in range(6)))
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), stack, nn.Flatten(2), nn.AdaptiveAvgPool1d(1))
    return model, (torch.randn(4, 3, 32, 32),), {}, lambda out: out.square().mean()


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="10MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
