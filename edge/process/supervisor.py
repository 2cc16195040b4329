"""What the process tells systemd of itself: that it serves, and that it ends (sd_notify(3))."""

import os
import socket


def notify(state: str) -> None:
    """Send a state such as `READY=1` to who started the process, where that listens; one that does not is no matter.

    The protocol is a datagram to the unix socket that `NOTIFY_SOCKET` names; "@" begins an abstract name.
    Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError:  # a start that systemd does not see is one that it ends
            return
