"""What is wrong with a configuration, a checkpoint or data: one line each."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: field, value, what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is one line: what, where, what to do."""


class DataError(ConfigError):
    """Training data that cannot be used where a run has come to it; the message names the file and the place in it."""
