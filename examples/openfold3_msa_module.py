"""The MSA module of OpenFold-3."""

import torch
from openfold3.core.model.latent.msa_module import MSAModuleStack

import evoplan

PAIR = {"c_hidden_mul": 12, "c_hidden_pair_att": 4, "no_heads_pair": 3, "pair_dropout": 0.25}
COMMON = {"transition_n": 4, "fuse_projection_weights": False, "blocks_per_ckpt": None, "inf": 1e9}


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    model = MSAModuleStack(
        c_m=16, c_z=12, c_hidden_msa_att=4, c_hidden_opm=4, no_heads_msa=2, no_blocks=4, eps=1e-3,
        transition_type="swiglu", msa_dropout=0.15, opm_first=True, **PAIR, **COMMON,
    )  # fmt: skip
    msa, pair = torch.rand(1, 7, 19) > 0.1, torch.rand(1, 19, 19) > 0.1
    masks = {"msa_mask": msa.float(), "pair_mask": pair.float()}
    args = torch.randn(1, 7, 19, 16), torch.randn(1, 19, 19, 12)
    return model.train(), args, masks, lambda out: out.square().mean()


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="2MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
