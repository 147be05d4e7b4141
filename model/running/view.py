"""Another way to run a module, which leaves everything that is the module's its own."""

from __future__ import annotations

from torch import nn

from evoplan.model.running.internals import share_state


class View(nn.Module):
    """A module that runs another: the same parameters, buffers, children, hooks and mode, by the same names.

    So snapshots, optimizers and averages of the one are the other's. What changes in one has changed in both.

    Args:
        stack: what is run.
    """

    stack: nn.Module

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        share_state(self, stack)
        self.__dict__["stack"] = stack  # not a child: names would change

    @property
    def training(self) -> bool:
        """The stack's own."""
        return self.stack.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "stack" in self.__dict__:  # nn.Module's constructor sets it before there is one
            self.stack.training = mode
