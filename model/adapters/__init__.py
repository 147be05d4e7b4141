"""Modules of other people's models that compute what a submodule of ours computes.

One file for each package. What is declared of our submodules (context, pieces, axes, kernels) then holds for
theirs; the layers stay theirs. That an adapter is right is shown where it is used (`model.foreign.declared`).
"""

from evoplan.model.adapters import boltz, openfold3
from evoplan.model.adapters.adapter import Adapter, adapter_of, adapters_in, register

register(*openfold3.ADAPTERS, *boltz.ADAPTERS)

__all__ = ["Adapter", "adapter_of", "adapters_in"]
