"""A ViT of transformers."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import evoplan


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
        image_size=64, patch_size=8, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    return model, (torch.randn(4, 3, 64, 64),), {}, lambda out: out.logits.square().mean()


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="7MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
