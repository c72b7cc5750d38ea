"""Command lines of train.py and eval.py: absl flags, with every mistake told in one line and exit code 2."""

from collections.abc import Callable, Sequence

from absl import flags, logging

from fp8jax.cli.errors import complain
from fp8jax.config import ConfigError
from fp8jax.training.checkpoint import CheckpointError


def run(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Parses the flags, runs `work`, returns the exit code.

    Errors that are the user's to mend (flags, config, checkpoint) are printed as one line, without a traceback.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            return complain(f"unknown argument {rest[1]!r}; flags start with --")
    except flags.Error as error:
        return complain(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:  # raised while a config file is loaded or changed
        return complain(str(error))
    try:
        return work()
    except (ConfigError, CheckpointError) as error:
        return complain(str(error))
