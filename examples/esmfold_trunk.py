"""The blocks of ESMFold's trunk, as transformers has them."""

import torch
from torch import nn
from transformers.models.esm.configuration_esm import TrunkConfig
from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock as Block

import evoplan


class Trunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))

    def forward(self, s, z, mask):
        for block in self.blocks:
            s, z = block(s, z, mask=mask)
        return s, z


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    widths = {"sequence_state_dim": 32, "pairwise_state_dim": 16}
    config = TrunkConfig(num_blocks=4, sequence_head_width=8, pairwise_head_width=8, dropout=0.1, **widths)
    args = torch.randn(1, 23, 32), torch.randn(1, 23, 23, 16), torch.ones(1, 23)
    return Trunk(config).train(), args, {}, lambda out: out[0].square().mean() + out[1].square().mean()


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="4MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
