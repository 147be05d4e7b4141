"""The Pairformer of OpenFold-3."""

import torch
from openfold3.core.model.latent.pairformer import PairFormerStack

import evoplan

PAIR = {"c_hidden_mul": 12, "c_hidden_pair_att": 4, "no_heads_pair": 3, "pair_dropout": 0.25}
COMMON = {"transition_n": 4, "fuse_projection_weights": False, "blocks_per_ckpt": None, "inf": 1e9}


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    model = PairFormerStack(
        c_s=24, c_z=12, c_hidden_pair_bias=8, no_heads_pair_bias=3, no_blocks=4, transition_type="swiglu",
        **PAIR, **COMMON,
    )  # fmt: skip
    single, pair = torch.rand(1, 21) > 0.1, torch.rand(1, 21, 21) > 0.1
    masks = {"single_mask": single.float(), "pair_mask": pair.float()}
    args = torch.randn(1, 21, 24), torch.randn(1, 21, 21, 12)
    return model.train(), args, masks, lambda out: sum(tensor.square().mean() for tensor in out)


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="3MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
