"""A BERT of transformers with dropout and a mask."""

import torch
from transformers import BertConfig, BertForMaskedLM

import evoplan


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4
    )
    tokens, mask = torch.randint(99, (4, 65)), torch.ones(4, 65, dtype=torch.long)
    mask[1, 40:] = 0
    kwargs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    return BertForMaskedLM(config).train(), (), kwargs, lambda out: out.loss


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="8MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
