"""`evoplan.fit` in a transformers Trainer: from the beginning of training to its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evoplan.planner.fitting.fitted import Fitted, fit


class TransformersFit(TrainerCallback):
    """Keeps a training step within a memory budget.

    Args:
        budget: as `evoplan.fit` takes it.
        example: a batch as the model is called with it, by keyword; made of the first samples if not given.
        options: others of `evoplan.fit`. Batches of other shapes run unplanned unless it says otherwise.

    Attributes:
        fitted: while training goes on.
    """

    def __init__(
        self, budget: str | int | None, example: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.budget, self.example = budget, example
        self.options: dict[str, Any] = {"on_change": "unplanned"} | options
        self.fitted: Fitted | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        example = self.example
        if example is None:
            samples = [loader.dataset[at] for at in range(min(len(loader.dataset), loader.batch_size or 1))]
            example = loader.collate_fn(samples)
        device = next(model.parameters()).device
        example = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in example.items()}
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        options: dict[str, Any] = {"autocast": autocast, "loss": lambda output: output.loss} | self.options
        self.fitted = fit(model, (), example, self.budget, **options)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model as it was."""
        if self.fitted is not None:
            self.fitted.remove()
            self.fitted = None
