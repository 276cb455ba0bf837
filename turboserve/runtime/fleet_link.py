"""The line between launcher and controller: whole messages over an inherited socket pair.

The launcher makes a new pair for every controller process, so whatever comes in belongs to the one that lives now.
Neither side ever waits for the other: a peer that does not read loses what does not fit, and hears everything anew
when the next controller starts.
"""

from __future__ import annotations

import contextlib
import socket

from turboserve.runtime import messages as m

RECORD_BYTES_MAX = 64 << 10


class FleetLink:
    """One end. `closed` once the peer has gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.closed = False

    @classmethod
    def pair(cls) -> tuple[FleetLink, socket.socket]:
        """(the launcher's end, the controller's end to hand down)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.set_inheritable(True)
        return cls(ours), theirs

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: m.Message) -> bool:
        """False when the peer has gone or does not read."""
        try:
            self._sock.send(m.encode(message))
        except BlockingIOError:
            return False
        except OSError:
            self.closed = True
            return False
        return True

    def receive(self) -> list[m.AnyMessage]:
        """What has come since the last call. ProtocolError on what is no message."""
        found: list[m.AnyMessage] = []
        while not self.closed:
            try:
                data = self._sock.recv(RECORD_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            found.append(m.decode(data))
        return found

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.close()
