"""What went wrong on the way."""

from __future__ import annotations


class PeerError(OSError):
    """A peer has said something that is of no use; the text may quote it, and so its secrets.

    Attributes:
        may_retry: Whether asking again may help.
    """

    def __init__(self, message: str, *, may_retry: bool = True) -> None:
        super().__init__(message)
        self.may_retry = may_retry
