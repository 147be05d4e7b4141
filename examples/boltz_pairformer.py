"""The Pairformer of Boltz-2."""

import torch
from boltz.model.layers.pairformer import PairformerModule

import evoplan


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    model = PairformerModule(
        token_s=24, token_z=16, num_blocks=4, num_heads=3, dropout=0.25, pairwise_head_width=8,
        pairwise_num_heads=2, v2=True,
    )  # fmt: skip
    masks = (torch.rand(1, 21) > 0.1).float(), (torch.rand(1, 21, 21) > 0.1).float()
    args = torch.randn(1, 21, 24), torch.randn(1, 21, 21, 16), *masks
    return model.train(), args, {}, lambda out: sum(tensor.square().mean() for tensor in out)


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="3MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
