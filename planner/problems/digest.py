"""What of a model a plan's figures depend on, in a few letters: two models with one digest cost the same."""

from __future__ import annotations

import hashlib

from evoplan.model.running.chain import Chain, Plannable
from evoplan.model.running.layers import altered_layers


def model_digest(model: Plannable) -> str:
    """Of the model as built: its steps, what each reads, its axes, its parameters' names and shapes."""
    steps = []
    for step in Chain.of(model).steps:
        submodule = step.submodule
        about = type(submodule).__name__, repr(submodule.axes), submodule.dropout > 0
        steps.append((step.name, step.reads, *about))
    parameters = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(repr((steps, parameters, model.outputs)).encode()).hexdigest()[:16]


def altered_names(model: Plannable) -> list[str]:
    """Layers of a model that are not what it was built of: replaced, or with hooks."""
    return [
        f"{step.name}.{name}" for step in Chain.of(model).steps for name, _ in altered_layers(step.submodule)
    ]
