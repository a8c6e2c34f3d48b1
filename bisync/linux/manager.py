"""What the service manager wants to know of a daemon: sd_notify(3), over a datagram socket."""

import contextlib
import os
import socket


def notify(text: str) -> None:
    """Tell the service manager, if there is one: ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one,
        contextlib.suppress(OSError),  # it does not listen any more; that is its business
    ):
        one.connect(address)
        one.sendall(text.encode())


def watchdog_s() -> float | None:
    """Seconds between two signs of life; ``None``: nobody waits for them."""
    text = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 2e6 if text.isdecimal() and int(text) and mine else None
