"""What tests of several processes share."""

import random
import socket


def free_port():
    """One below those that the system gives to whoever asks for any, and the next one, which is used, too."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as one, socket.socket() as next_one:
            try:
                one.bind(("", port))
                next_one.bind(("", port + 1))
                return port
            except OSError:
                continue
