"""From a configuration to the model that it describes."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

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
    with torch.device("meta"):
        return build_model(config).train()


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
