"""Whether what runs again makes the same: told by norms, as the tensors themselves are gone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evoplan.model.running.internals import has_data

Fingerprint = tuple[tuple[float, float], ...]

_REPEATED = {torch.float64: 1e-10, torch.float32: 1e-5}


def fingerprint(made: Sequence[Tensor]) -> Fingerprint:
    """The norm of each tensor, and to which part of it kernels repeat themselves."""
    return tuple(
        (float(torch.linalg.vector_norm(tensor.detach())), _REPEATED.get(tensor.dtype, 1e-2))
        for tensor in made
        if tensor.is_floating_point() and has_data(tensor)
    )


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two runs made the same."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=part) or not (math.isfinite(a) or math.isfinite(b))
        for (a, part), (b, _) in zip(one, other, strict=True)
    )
