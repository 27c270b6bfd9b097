"""Errors that a user can mend."""


class ConfigError(ValueError):
    """A setting is out of its range, contradicts another, or names something that is not there.

    The message says the value, the limit and the remedy; the command line prints it without a traceback.
    """


class CheckpointError(ValueError):
    """A file or folder is no checkpoint of a training run, or not a whole one."""
