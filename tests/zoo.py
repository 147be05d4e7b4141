"""Models as people write them, small: what `evoplan.fit` is tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evoplan


class Case(NamedTuple):
    """A model, what it is called with, and a loss of what it returns; None: the mean of squares."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    loss: Callable[[Any], Tensor] | None = None

    def fit(self, budget: int | None = None, **options: Any) -> evoplan.Fitted:
        """The model under a plan."""
        return evoplan.fit(self.model, self.args, self.kwargs, budget, self.loss, **options)


class Attention(nn.Module):
    """Causal, written inline."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        logits = (q @ k.transpose(-1, -2) / (width / self.heads) ** 0.5).masked_fill(hidden, float("-inf"))
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A transformer's."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp, self.dropout = nn.LayerNorm(width), MLP(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, width: int = 32, blocks: int = 5, dropout: float = 0.1, words: int = 50) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Two convolutions, whose normalisations count what they see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


class CNN(nn.Module):
    """Images in, logits out."""

    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(images)).mean((2, 3)))


class PairBlock(nn.Module):
    """Rewrites a single and a pair representation; what it makes first, it reads again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width)
        self.to_single, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, s: Tensor, z: Tensor, *, mask: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        z = z + self.mlp(self.norm(z)) * mask[..., None] * scale
        return s + torch.sigmoid(self.gate(s)) * self.to_single(z).mean(-2), z


class Pairs(nn.Module):
    """A stack over two tensors; blocks are given keywords, a mask and a number."""

    def __init__(self, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock(width) for _ in range(blocks))

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            s, z = block(s, z, mask=mask, scale=0.5)
        return s, z


class Skips(nn.Module):
    """As a U-Net: later blocks read what earlier ones made, through a product of the model itself."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(width) for _ in range(3))
        self.join = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(3))
        self.up = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        for block, join in zip(self.up, self.join, strict=True):
            x = block(join(torch.cat([x, kept.pop()], -1)))
        return x


class Recycled(nn.Module):
    """The same blocks several times over, without gradients but for the last."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        start, x = x, torch.zeros_like(x)
        for turn in range(3):
            with torch.set_grad_enabled(turn > 0):
                x = start + 0.5 * x
                for block in self.blocks:
                    x = block(x)
        return x


class CrossBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.mlp = nn.Linear(width, width), MLP(width)

    def forward(self, x: Tensor, memory: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        x = x + torch.tanh(self.read(memory)).mean(1, keepdim=True) * options["gain"]
        return {"x": x + self.mlp(x), "unused": None}


class Decoder(nn.Module):
    """Every block reads the same memory, which wants a gradient; arguments and results are dictionaries."""

    def __init__(self, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.encode, self.gain = nn.Linear(width, width), nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleDict({f"layer{i}": CrossBlock(width) for i in range(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encode(x)
        for layer in self.layers.values():
            x = layer(x, memory, {"gain": self.gain})["x"]
        return x


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _tokens() -> Tensor:
    return torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), *(Block(16) for _ in range(4)), nn.Linear(16, 5))


CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: Case(GPT(), (_tokens(),)),
    "cnn": lambda: Case(CNN(), (random(2, 3, 9, 7).requires_grad_(),)),
    "pairs": lambda: Case(
        Pairs(),
        (random(2, 5, 16).requires_grad_(), random(2, 5, 5, 16).requires_grad_()),
        {"mask": (random(2, 5, 5) > 0).double()},
    ),
    "sequential": lambda: Case(_sequential(), (random(3, 7, 12),)),
    "skips": lambda: Case(Skips(), (random(2, 6, 16).requires_grad_(),)),
    "recycled": lambda: Case(Recycled(), (random(2, 6, 16).requires_grad_(),)),
    "decoder": lambda: Case(Decoder(), (random(2, 6, 16).requires_grad_(),)),
}


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A case in training mode, no weight of it zero."""
    torch.manual_seed(0)
    made = CASES[name]()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    args, kwargs = tuple(map(cast, made.args)), {name: cast(value) for name, value in made.kwargs.items()}
    return made._replace(model=made.model.to(dtype).train(), args=args, kwargs=kwargs)
