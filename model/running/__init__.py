"""How submodules are run. Whatever is imported of this, all kinds of runs are known."""

from evoplan.model.running import kinds as kinds
