"""`evoplan.fit` in a Lightning trainer: from the first batch on, until training ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from evoplan.planner.fitting.fitted import Fitted, fit
from evoplan.planner.fitting.simulating import Loss

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LightningFit(Callback):
    """Keeps a training step within a memory budget.

    Args:
        budget: as `evoplan.fit` takes it.
        inputs: from a batch, what the planned module is called with: args and kwargs.
        module: which module that is, of the LightningModule; itself if not given.
        loss: of what the module returns; the mean of squares if not given.
        options: others of `evoplan.fit`. Batches of other shapes run unplanned unless it says otherwise.

    Attributes:
        fitted: once the first batch has come.
    """

    def __init__(
        self,
        budget: str | int | None,
        inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]],
        module: Callable[[LightningModule], nn.Module] = lambda module: module,
        loss: Loss | None = None,
        **options: Any,
    ) -> None:
        self.budget, self.inputs, self.module, self.loss = budget, inputs, module, loss
        self.options: dict[str, Any] = {"on_change": "unplanned"} | options
        self.fitted: Fitted | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Plan, if it has not been done."""
        if self.fitted is None:
            args, kwargs = self.inputs(batch)
            options: dict[str, Any] = {"autocast": AUTOCAST.get(str(trainer.precision))} | self.options
            self.fitted = fit(self.module(pl_module), args, kwargs, self.budget, self.loss, **options)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model as it was."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The model as it was."""
        self._remove()

    def _remove(self) -> None:
        if self.fitted is not None:
            self.fitted.remove()
            self.fitted = None
