"""What an event loop holds of a thread that blocks on a socket: a deadline, and the means to wake it at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

PATIENCE = 0.002  # s that a thread waits for its socket before it leaves the wait to the event loop


class Lifeline:
    """Shutting a socket down wakes whatever blocks on it; closing it never does.

    The lock sees to it that one side, the thread or the loop, cleans up after a request that was cut off.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # by time.monotonic()
        self.is_cut: bool = False
        self.patience: float = PATIENCE
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        self._resting = False

    def remaining(self) -> float:
        """Return the seconds left; raise TimeoutError if there are none, or if the lifeline is cut."""
        remaining = self.deadline - time.monotonic()
        if self.is_cut or remaining <= 0:
            raise TimeoutError("timed out")
        return remaining

    def hold(self, sock: socket.socket) -> None:
        """In the thread, before it blocks on this socket; raises as ``remaining``."""
        with self._lock:
            self.remaining()
            self._held, self._resting = sock, False

    def rest(self) -> bool:
        """In the thread, when it leaves the connection to the loop; if False, it must clean up."""
        with self._lock:
            self._held, self._resting = None, not self.is_cut
            return self._resting

    def finish(self) -> bool:
        """In the thread, when it is done and cleans up itself; False if it was cut off."""
        with self._lock:
            self._held, self._resting = None, False
            return not self.is_cut

    def cut(self) -> bool:
        """In the loop: wake the thread, now or when it next blocks; if True, the loop cleans up."""
        with self._lock:
            self.is_cut = True
            if self._held is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown: it drops the TLS state under the thread that is reading.
                    socket.socket.shutdown(self._held, socket.SHUT_RDWR)
            return self._resting
