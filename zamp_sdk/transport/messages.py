"""What goes into the transport and what comes out of it: a request, and its reply or the reason why there is none.

And what a base URL says, for whoever has to know. A base URL is normalised: ``https://host/prefix``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, NamedTuple, Sequence


class Reply(NamedTuple):
    """What came back: header names are in lower case, and the content coding is undone."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes
    secrets: Sequence[str] = ()
    """The user name and password of the proxy that it came through, which a peer may have echoed."""

    def __repr__(self) -> str:  # error reporters ship the repr of variables, and a peer may have echoed the token
        return f"<Reply {self.status_code} of {len(self.body)} bytes>"


class Failure(NamedTuple):
    """A request without a reply."""

    message: str
    """What happened, and what a person should do about it; fit to be shown."""
    may_have_left: bool
    """Whether a byte of the request itself may have left."""
    may_retry: bool
    """Whether the same request may fare better later."""
    cause: Exception | None = None


@dataclass(frozen=True)
class Request:
    """What to send where; its repr shows neither the token nor the data."""

    method: str
    base_url: str
    """The platform's."""
    path: str
    """What follows the base URL; it begins with a slash."""
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    read: Callable[[Reply], Any] = field(repr=False)
    """Makes of a reply what the exchange returns. It is called once, in a thread, for a reply may be long."""
    redact: Callable[[str, Sequence[str]], str] = field(repr=False)
    """Makes text that a peer wrote fit to be shown; the second argument are secrets beside those it knows itself."""


HELD_BACK = object()
"""What comes of an exchange whose ``is_held_back`` said yes: nothing was sent."""


class Exchange:
    """One request on its way. It is sent once; however that ends, the attributes say how far it came."""

    def __init__(self, request: Request, timeout: float, is_held_back: Callable[[], bool] = lambda: False) -> None:
        self.request: Request = request
        self.timeout: float = timeout
        """Seconds for all of it together; waiting in the pool's line for room does not count."""
        self.is_held_back: Callable[[], bool] = is_held_back
        """Asked once there is room for a connection, for which the request may have waited long."""
        self.may_have_left: bool = False
        """Whether a byte of the request may have left."""
        self.sent_at: float = 0.0
        """When it was sent, by ``time.monotonic``."""
        self.answer: Any = None
        """What ``request.read`` has made of the reply, even if nobody was left to be told."""


def authority(base_url: str) -> str:
    """Return the host of a base URL, and the port if it has one (RFC 3986, 3.2)."""
    return base_url.split("/")[2]


def is_this_machine(base_url: str) -> bool:
    """Whether a base URL leads to this machine itself: ``localhost``, 127.0.0.0/8 or ``[::1]``."""
    return bool(re.fullmatch(r"(127(\.\d+){3}|localhost|\[::1\])(:\d+)?", authority(base_url)))
