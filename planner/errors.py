"""What a run ends with, in one line."""


class CommonError(ValueError):
    """Bad input that all ranks see alike: the line needs no rank before it."""


class RunError(RuntimeError):
    """A run that cannot go on; all ranks see it alike, and the line names who is to blame."""
