"""Exit codes of all commands; any other is a crash."""

FINISHED = 0
# Of `audit` alone: the run that it was asked about would fail.
WOULD_FAIL = 1
BAD_USAGE = 2
# By bad numbers or the early warning, after saving.
BAD_NUMBERS = 3
# On request (a signal), after saving: run again to continue.
STOPPED = 4
