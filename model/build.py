"""From a configuration to the model that it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import nn

from evoplan.model.config import ModelConfig
from evoplan.model.families import family_of
from evoplan.model.programs.program import Program
from evoplan.model.running.chain import Plannable


def build_model(config: ModelConfig) -> Plannable:
    """The model that a configuration describes."""
    model: Plannable = _named(family_of(config).stack)(config)
    return model


@lru_cache(maxsize=4)
def model_without_data(config: ModelConfig) -> Plannable:
    """The same on the meta device and in training mode; whoever asks is given the same one, to look at."""
    with torch.device("meta"), _only_data_initialised():
        return build_model(config).train()


@contextmanager
def _only_data_initialised() -> Iterator[None]:
    """Layers without data are left as they are made: drawing what nobody holds takes most of their time."""

    def skipping(initialise: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(initialise)
        def reset_parameters(layer: nn.Module) -> None:
            if not all(parameter.is_meta for parameter in layer.parameters()):  # of another thread's model
                initialise(layer)

        return reset_parameters

    kinds: tuple[Any, ...] = (nn.Linear, nn.LayerNorm)
    own = [kind.reset_parameters for kind in kinds]
    for kind, initialise in zip(kinds, own, strict=True):
        kind.reset_parameters = skipping(initialise)
    try:
        yield
    finally:
        for kind, initialise in zip(kinds, own, strict=True):
            kind.reset_parameters = initialise


def program_type(config: ModelConfig) -> type[Program]:
    """What is trained around a model.

    Raises:
        ValueError: nothing is; says what to use instead.
    """
    family = family_of(config)
    if family.program is None:
        use = f"; use {family.instead}" if family.instead else ""
        raise ValueError(f"run trains on alignments, for which {family.name} has no program{use}")
    program: type[Program] = _named(family.program)
    return program


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
