"""A Llama of transformers, in a little more than half of the memory that it takes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evoplan


def build():
    """The model, what it is called with, and its loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(99, (4, 65))
    return LlamaForCausalLM(config), (), {"input_ids": tokens, "labels": tokens}, lambda out: out.loss


if __name__ == "__main__":
    model, args, kwargs, loss = build()
    fitted = evoplan.fit(model, args, kwargs, budget="7.5MiB", loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(fitted(*args, **kwargs)).backward()
        optimizer.step()
    print(fitted.report(), fitted.verify(args, kwargs), sep="\n")
