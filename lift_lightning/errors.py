"""Errors that a user can mend."""


class ConfigError(ValueError):
    """A setting is out of its range, contradicts another, or names something that is not there.

    The message says the value, the limit and the remedy; the command line prints it without a traceback.
    """


class CheckpointError(ValueError):
    """A file or folder is no checkpoint of a training run, or not a whole one."""


class DeltaError(ValueError):
    """A delta is broken, does not fit the weights that it is given, or cannot be made of two checkpoints."""
