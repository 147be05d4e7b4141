"""Gradients of a run in pieces, summed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from evoplan.model.running.context import Context
from evoplan.model.running.internals import as_input, without_hooks
from evoplan.model.running.slices import view
from evoplan.model.running.submodule import Submodule, Tensors

# Gradients by name: those of the state tensors, and those of the parameters.
OfState = dict[str, Tensor]
OfParameters = dict[str, Tensor]


class Gradients:
    """The gradients of a submodule's inputs and parameters.

    Make it where backward runs, before the context of the forward is in force.

    Args:
        parameters: those that a gradient is wanted of.
        wanted: state tensors that one is wanted of.
        grad: of the new target.
    """

    def __init__(
        self,
        submodule: Submodule,
        parameters: Mapping[str, Tensor],
        tensors: Tensors,
        wanted: Collection[str],
        grad: Tensor,
    ) -> None:
        self.parameters, self._outside = parameters, Context()
        target, *others = submodule.reads
        self.of_state: OfState = {name: torch.zeros_like(tensors[name]) for name in others if name in wanted}
        if target in wanted and not submodule.residual:
            self.of_state[target] = torch.zeros_like(tensors[target])
        elif target in wanted:
            # The residual passes the target's gradient on; where no stage reads the target, that is all.
            read = target in submodule.norms
            self.of_state[target] = grad.clone(memory_format=torch.contiguous_format) if read else grad
        self.of_parameters: OfParameters = {}

    def wanted(self, tensors: Tensors) -> dict[str, Tensor]:
        """Of some tensors, those of the state that a gradient is wanted of."""
        return {name: tensor for name, tensor in tensors.items() if name in self.of_state}

    def reach(self, name: str) -> bool:
        """Whether a gradient is wanted of a state tensor or of its normalisation."""
        return name in self.of_state or any(p.startswith(f"norms.{name}.") for p in self.parameters)

    def differentiate(
        self, function: Callable[[Tensors], Tensor], leaves: Tensors, grad: Tensor
    ) -> dict[str, Tensor | None]:
        """Gradients of `leaves` through function(leaves); those of parameters are added up here."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        with torch.enable_grad():
            made = function({name: as_input(leaf) for name, leaf in leaves.items()})
        if not made.requires_grad:
            return dict.fromkeys(leaves)
        edge = torch.autograd.graph.get_gradient_edge(made)
        del made
        # Backward's operators run under what backward was called under.
        with self._outside, without_hooks(self.parameters.values()):
            grads = torch.autograd.grad(
                edge, [*leaves.values(), *self.parameters.values()], grad, allow_unused=True
            )
        for name, term in zip(self.parameters, grads[len(leaves) :], strict=True):
            if term is not None:
                total = self.of_parameters.get(name)
                # In half precision the sum is taken in single: a whole run rounds once, not at every piece.
                wide = term.float() if term.element_size() == 2 else term
                self.of_parameters[name] = wide if total is None else total.add_(wide)
        return dict(zip(leaves, grads, strict=False))

    def rounded(self) -> OfParameters:
        """Gradients of the parameters in the parameters' own dtype."""
        return {name: total.to(self.parameters[name].dtype) for name, total in self.of_parameters.items()}

    def add_slices(self, grads: Mapping[str, Tensor | None], cuts: Mapping[str, int], span: slice) -> None:
        """Add gradients of slices of the state to those of the whole."""
        for name, term in grads.items():
            if name in self.of_state and term is not None:
                total = self.of_state[name]
                (view(total, cuts[name], span) if name in cuts else total).add_(term)
