"""A submodule's parameters as one forward found them, for what runs again in its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from evoplan.model.running.internals import members, put_parameter
from evoplan.model.running.unchanged import check, marks


class Parameters:
    """Parameters by name, looked up when the submodule runs: they may be others at the next forward.

    Between forward and backward the module may get others (`load_state_dict(assign=True)`,
    `torch.func.functional_call`), or have some frozen. Autograd goes on with those of the forward, and so
    does what runs `installed`.

    Args:
        of_module: its parameters by name, if they are known.

    Attributes:
        all: every parameter.
        trained: those that a gradient is wanted of.
    """

    def __init__(self, module: nn.Module, of_module: dict[str, Tensor] | None = None) -> None:
        self.module = module
        self.all: dict[str, Tensor] = members(module).parameters if of_module is None else of_module
        self.trained = {name: tensor for name, tensor in self.all.items() if tensor.requires_grad}
        self._marks = marks(self.all)

    def check(self, owner: str) -> None:
        """See that none was written into; ChangedError names it, and the step `owner` whose it is."""
        check(self._marks, self.all, owner)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The module with these parameters, trained as they were."""
        found = members(self.module)
        present = found.parameters
        if present.keys() != self.all.keys():
            odd = ", ".join(sorted(present.keys() ^ self.all.keys()))
            raise RuntimeError(
                f"layers were replaced between forward and backward ({odd}); do so after backward"
            )
        listed = {name: name for name in present} | found.tied
        others = {at: present[name] for at, name in listed.items() if present[name] is not self.all[name]}
        for at in others:
            put_parameter(self.module, at, self.all[listed[at]])
        try:
            with self.as_trained():
                yield
        finally:
            for at, tensor in others.items():
                put_parameter(self.module, at, tensor)

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Those parameters trained as they were, whatever the module has now."""
        toggled = [
            tensor for name, tensor in self.all.items() if tensor.requires_grad != (name in self.trained)
        ]
        for tensor in toggled:
            tensor.requires_grad_(not tensor.requires_grad)
        try:
            yield
        finally:
            for tensor in toggled:
                tensor.requires_grad_(not tensor.requires_grad)
