"""How every command tells a mistake: one line on standard error, exit code 2."""

import sys

BAD_USAGE = 2


def complain(message: str) -> int:
    """Prints a message on one line of standard error and returns 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    return BAD_USAGE
