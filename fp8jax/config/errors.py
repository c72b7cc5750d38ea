"""Errors for a configuration, a checkpoint or data, with a message of one line each."""


class ConfigError(ValueError):
    """An error for a configuration that cannot run; one line names field, value and what is
    allowed.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class CheckpointError(ValueError):
    """An error for a checkpoint that cannot be written or read; one line names the fault, the place
    and the fix.
    """


class DataError(ConfigError):
    """An error for training data that a run reaches and cannot use; the message names the file and
    the place in it.
    """
