"""Free ports for processes that will find each other by them."""

import contextlib
import errno
import random
import socket

_LOWEST, _HIGHEST = 10_240, 32_767  # above, Linux takes the ports it gives to whoever asks for any


def free_ports(number: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody uses now, and that the system gives to nobody before they are used.

    Raises:
        OSError: There are none, or the host is not this machine.
    """
    drawn = random.SystemRandom().sample(range(_LOWEST, _HIGHEST + 1), 50 * number)
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in drawn:
            if len(found) == number:
                return found
            one = stack.enter_context(socket.socket())
            try:
                one.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                found.append(port)
    raise OSError(errno.EADDRINUSE, f"no {number} free ports from {_LOWEST} to {_HIGHEST}")
